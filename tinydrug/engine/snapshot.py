"""A sequence on disk: a safetensors file with what its cache holds, bound to the model that wrote it.

Tensors: ids (T,), and the blocks of the cache in use, keys (L, G, B, d, 16) and values (L, G, B, 16, d). The
metadata are a format, the package's version, the model's identity, the rest of the state as JSON, and a
digest of all this: a file cut or changed anywhere is refused.
"""

import hashlib
import json
import os
from typing import TYPE_CHECKING

import numpy as np

from tinydrug.engine.cache import CELLS
from tinydrug.engine.files import replacing
from tinydrug.engine.history import Noise, Write, check
from tinydrug.engine.identity import difference, package_version
from tinydrug.errors import BadModelFile, ConfigError
from tinydrug.formats import safetensors
from tinydrug.noise import COUNTED

if TYPE_CHECKING:
    from tinydrug.engine.session import Session

FORMAT = "tinydrug session 1"
TEXTS = ("format", "version", "identity", "state")
MAX_COUNT = 2**63


def save(session: "Session", path: str | os.PathLike) -> None:
    """ConfigError naming the path if the disk does not take it."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    blocks, cache = session.blocks(), session.cache
    cache.wipe(blocks, session._written, session.pos)
    tensors = {
        "ids": np.array(session.ids, np.int32),
        "keys": np.take(cache.keys, blocks, 2),
        "values": np.take(cache.by_block(), blocks, 2),
    }
    texts = {
        "format": FORMAT,
        "version": package_version(),
        "identity": json.dumps(_identity(session)),
        "state": json.dumps(_state(session)),
    }
    texts["digest"] = _digest(texts, tensors)
    with replacing(path) as partial:
        try:
            save_file(tensors, partial, texts)
        except SafetensorError as error:
            raise OSError(error) from None


def load(session: "Session", path: str | os.PathLike) -> None:
    """Fill an empty session. BadModelFile if the file is damaged, ConfigError if it is another model's."""
    path = os.fspath(path)
    texts, found = safetensors.read_metadata(path), safetensors.read(path)
    if texts.get("format") != FORMAT:
        raise BadModelFile(path, "not a session that this version of tinydrug has saved")
    if texts.get("digest") != _digest(texts, {name: tensor.data for name, tensor in found.items()}):
        raise BadModelFile(path, "damaged: it does not have the digest that it was saved with")
    was, here = texts.get("version"), package_version()
    if was != here:
        raise ConfigError(f"{path}: saved by tinydrug {was}, this is {here}", "version")
    identity, state = (_object(path, texts.get(name, "")) for name in ("identity", "state"))
    if differs := difference(identity, _identity(session)):
        raise ConfigError(f"{path}: saved with another model: {differs[1]}", differs[0])
    try:
        _restore(session, state, found)
    except (KeyError, TypeError, ValueError) as error:
        raise BadModelFile(path, f"its state makes no sense: {error}") from None


def _object(path: str, text: str) -> dict:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise BadModelFile(path, "its metadata are not JSON objects")
    return value


def _identity(session: "Session") -> dict:
    return session.runtime.identity | {"slots": session.cache.slots}


def _state(session: "Session") -> dict:
    return {
        "noise": session.noise.to_dict(),
        "rewind_every": session.rewind_every,
        "written": session._written,
        "clean": session.clean,
        "spans": session.spans,
        "history": [write.to_dict() for write in session.history],
        "moved": dict(zip(COUNTED, session.moved.tolist(), strict=True)),
    }


def _restore(session: "Session", state: dict, found: dict) -> None:
    """ValueError (or the like) unless everything is in its range: the kernels trust it."""
    n_ctx = session.runtime.n_ctx
    ids = _array(found, "ids", "i32", np.int32, None)
    if ids.ndim != 1 or len(ids) > n_ctx:
        raise ValueError(f"its ids are {ids.shape}")
    session.check(ids.tolist())
    session.ids = ids.tolist()
    session._written = _whole(state["written"], len(ids), n_ctx)
    if session._lost(session.pos):
        raise ValueError(f"written {session._written} leaves too little behind")
    blocks, cache = session.blocks(), session.cache
    kinds = {np.dtype(dtype): kind for kind, dtype in CELLS.items()}
    for name, cells in (("keys", cache.keys), ("values", cache.by_block())):
        shape = (*cells.shape[:2], len(blocks), *cells.shape[3:])
        cells[:, :, blocks] = _array(found, name, kinds[cells.dtype], cells.dtype, shape)
    if len(found) != 3:
        raise ValueError(f"it holds {', '.join(found)}")

    session.put_noise(Noise.from_dict(state["noise"]))
    _whole(session.born, 0, n_ctx)
    session.rewind_every = _whole(state["rewind_every"], 0, MAX_COUNT)
    clean = _whole(state["clean"], 0, session.pos)
    session._clean = clean if clean < session.pos else None
    cache.loaded(session.pos, session._clean is None)
    session.spans = [(first, last) for first, last in state["spans"]]
    ends = [_whole(end, clean, session.pos) for span in session.spans for end in span]
    if ends != sorted(set(ends)):
        raise ValueError(f"spans {session.spans} are not in order")
    session.history = [Write.from_dict(write) for write in state["history"]]
    check(session.history, session.pos)
    if bool(session.history) != (session._clean is not None):
        raise ValueError("a history belongs to drugged rows")
    session.moved[:] = [_whole(state["moved"][name], 0, MAX_COUNT - 1) for name in COUNTED]


def _array(found: dict, name: str, kind: str, dtype, shape: tuple | None) -> np.ndarray:
    """A tensor of the file that must be of this kind and shape."""
    tensor = found[name]
    if tensor.kind != kind or (shape is not None and tensor.shape != shape):
        raise ValueError(f"its {name} are {tensor.kind} {tensor.shape}, not {kind} {shape}")
    return tensor.data.view(np.dtype(dtype).newbyteorder("<")).reshape(tensor.shape)


def _whole(value, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{value!r} is not between {low} and {high}")
    return value


def _digest(texts: dict[str, str], tensors: dict) -> str:
    """Of the texts and of the tensors' bytes, in hexadecimal digits."""
    digest = hashlib.sha256(json.dumps([texts.get(name) for name in TEXTS]).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name])
    return digest.hexdigest()
