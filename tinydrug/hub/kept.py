"""The packed weights kept of a model in weights/NAME-QUANT: where they are, and whether they still fit it."""

import logging
import re
from contextlib import suppress
from pathlib import Path

from tinydrug.errors import BadModelFile, ModelNotFound
from tinydrug.formats.checkpoint import Checkpoint, open_checkpoint
from tinydrug.formats.packed import FILE, fingerprint
from tinydrug.hub.resolve import Resolved, resolve, shown
from tinydrug.hub.table import home, read_table

log = logging.getLogger("tinydrug")


def find(name: str | None, quant: str, **how) -> Resolved:
    """What `resolve` finds, but before anything is downloaded, the packed weights that are kept of it."""
    name = read_table().default if name is None else name
    with suppress(ModelNotFound):
        return resolve(name, **how | {"pull": False})
    place = place_of(name, quant)
    return resolve(place) if (place / FILE).is_file() else resolve(name, **how)


def kept(found: Resolved, quant: str, mmap: bool = True) -> Checkpoint | None:
    """The packed weights that are kept of a model, None if there are none of its files as they are."""
    place = place_of(found.name, quant)
    if not (place / FILE).is_file():
        return None
    try:
        checkpoint = open_checkpoint(place, mmap)
    except BadModelFile as error:
        log.warning("%s (not used)", error)
        return None
    if (checkpoint.packed.quant, checkpoint.packed.source) != (quant, fingerprint(found.path)):
        log.warning(
            "%s is not used, it was packed from other files: `tinydrug quantize` packs anew", shown(place)
        )
        return None
    log.info("weights from %s", shown(place))
    return checkpoint


def place_of(name: str, quant: str) -> Path:
    """The folder for a model's packed weights."""
    plain = re.sub(r"[^\w.-]+", "--", name)
    return home() / f"{plain}-{'packed' if quant == 'none' else quant}"


def note(found: Resolved, quant: str) -> str:
    """What that folder says of itself: `resolve` shows it."""
    return f"packed{'' if quant == 'none' else f' as {quant}'} from {found.source}\n"
