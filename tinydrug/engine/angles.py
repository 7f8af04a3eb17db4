"""Angles for doses that are told by their effect: found on this model once, then kept in the user's cache."""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from tinydrug.engine.calibrate import solve
from tinydrug.engine.custom import FIRST_CODE
from tinydrug.engine.files import replacing
from tinydrug.engine.runtime import Runtime
from tinydrug.errors import ConfigError, DrugError
from tinydrug.kernels.jit import cache_folder
from tinydrug.noise import Dose, Schedule
from tinydrug.noise.laws import LAWS

log = logging.getLogger("tinydrug")

FORMAT = 1  # of the files, and of the way the angles are found


def settle(
    runtime: Runtime,
    schedule: Schedule,
    pieces: Sequence[Sequence[int]],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Schedule:
    """The schedule with an angle in every open dose: each has its effect alone, at scale 1, on these tokens.

    Raises DrugError for an effect that no angle has.
    """
    doses, files = list(schedule.doses), {}
    for i, dose in enumerate(doses):
        if dose.is_open:
            files[i] = _file(runtime, dose, schedule.sink, pieces)
            theta = _recall(files[i])
            doses[i] = dose if theta is None else replace(dose, theta=theta)
    todo = [i for i, dose in enumerate(doses) if dose.is_open]
    if todo:
        log.info("finding the angle of %s (once for a model)", ", ".join(str(doses[i]) for i in todo))
    solved = solve(runtime, pieces, [doses[i] for i in todo], sink=schedule.sink, progress=progress)
    for i, found in zip(todo, solved, strict=True):
        if not found.reached:
            less = found.kl < doses[i].theta.kl
            advice = (
                "ask for less, or dose more layers" if less else "less drowns in rounding, try --quant f32"
            )
            raise DrugError(
                f"drug {doses[i]}: no angle has this effect, the nearest is KL {found.kl:.3g} at "
                f"{found.dose.theta:g} radians: {advice}"
            )
        _keep(files[i], {"dose": str(doses[i]), "theta": found.dose.theta, "kl": found.kl})
        doses[i] = found.dose
    for was, now in zip(schedule.doses, doses, strict=True):
        if was.is_open:
            log.info("%s is %s on this model", was, now)
    return replace(schedule, doses=tuple(doses))


def _file(runtime: Runtime, dose: Dose, sink: int, pieces: Sequence[Sequence[int]]) -> Path | None:
    """Where the angle of this dose is kept, by all that it depends on; None: nowhere."""
    folder = cache_folder()
    if folder is None or LAWS[dose.law].code >= FIRST_CODE:  # the code of another's law may change
        return None
    identity = {name: value for name, value in runtime.identity.items() if name != "n_ctx"}
    key = [FORMAT, identity, str(dose), sink, [list(piece) for piece in pieces]]
    return folder.parent / "angles" / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.json"


def _recall(path: Path | None) -> float | None:
    """The angle in this file; None if there is none, or it is damaged."""
    try:
        theta = json.loads(path.read_text("utf-8"))["theta"] if path else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return theta if isinstance(theta, float) and 0 <= theta < 1e3 else None


def _keep(path: Path | None, found: dict) -> None:
    if path is None:
        return
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        with replacing(path) as partial, open(partial, "w", encoding="utf-8") as file:
            json.dump(found, file)
    except (OSError, ConfigError) as error:  # a full disk must not stop a run
        log.warning("the angle of %s is not kept: %s", found["dose"], error)
