"""From a name to a running model: find it, check it, pack it, compile. And what that would take, undone."""

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from tinydrug.api import Engine
from tinydrug.engine.cache import RingCache, slots_needed
from tinydrug.engine.checks import whole
from tinydrug.engine.runtime import REWIND_EVERY, Runtime
from tinydrug.engine.threads import check_threads
from tinydrug.errors import BadModelFile, ConfigError
from tinydrug.formats.checkpoint import Checkpoint, open_checkpoint
from tinydrug.formats.config import Config, Fields
from tinydrug.formats.packed import check_target, save
from tinydrug.formats.weights import QUANTS, Need, Weights, check, packed_bytes, padded
from tinydrug.hub import Resolved, resolve
from tinydrug.hub.kept import find, kept, note, place_of
from tinydrug.hub.resolve import shown
from tinydrug.models import find_model
from tinydrug.models.features import Features
from tinydrug.text.tokenizer import load_tokenizer

log = logging.getLogger("tinydrug")


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint holds and what running it would take, in bytes; nothing is loaded."""

    path: str
    model_type: str
    config: Config
    parameters: int
    file_bytes: int
    bytes_by_kind: dict[str, int]
    weight_bytes: dict[str, int]  # resident, by --quant
    cache_bytes_per_token: int  # at f16


def load(
    model: str | os.PathLike | None = None,
    *,
    quant: str = "none",
    threads: int | None = None,
    ctx: int | None = None,
    cache: str = "f16",
    attention: str = "softmax",
    features: int | None = None,
    feature_seed: int = 0,
    state: str = "f32",
    chunk: int = 512,
    rewind_every: int = REWIND_EVERY,
    prefix_reuse: bool = True,
    keep_packed: bool = False,
    mmap: bool = True,
    check_tensors: bool = False,
    pull: bool | None = None,
    offline: bool = False,
    ask: Callable[[str], bool] | None = None,
    bars: bool = False,
    progress: Callable[[str, float], None] | None = None,
) -> Engine:
    """Load a model by path or name; None is the default model, fetched on first use.

    quant: none (as the file has it), f32, q8 or q4. threads: None for all this process may use. ctx:
    tokens of context, 0 or None for the model's own. cache: f16 or f32. chunk: prompt tokens fed at once.
    rewind_every: drugged tokens after which the cache is written anew without noise, 0 for never.
    attention: softmax, or srf: estimated by so many random features (None: as many as a head is wide), drawn
    from feature_seed, with a recurrent state, f32 or f16, in place of the cache; for models tuned to it.
    prefix_reuse: keep the last sequence's cache, for a next prompt that begins like it.
    keep_packed: write the weights as they are packed to weights/NAME-QUANT, as `quantize` does. If they are
    there, and of the same files, they are mapped from there in any case.
    pull, offline, ask, bars: how a model that is not on disk is come by (hub.resolve). progress(phase,
    share) is called for "load" and "compile".

    Raises ModelNotFound, DownloadError, BadModelFile, UnsupportedModel, ConfigError.
    """
    _check_quant(quant)
    whole(rewind_every, "--rewind-every", field="rewind_every")
    if cache not in ("f16", "f32"):
        raise ConfigError(f"--cache-type: {cache!r} is not f16 or f32", "cache")
    if attention not in ("softmax", "srf"):
        raise ConfigError(f"--attention: {attention!r} is not softmax or srf", "attention")
    if state not in ("f32", "f16"):
        raise ConfigError(f"--state-type: {state!r} is not f32 or f16", "state")
    if attention == "softmax" and (features, feature_seed, state) != (None, 0, "f32"):
        raise ConfigError("--features, --feature-seed and --state-type need --attention srf", "attention")
    whole(chunk, "--batch-size", 1, field="chunk")
    threads = check_threads(threads)
    name = None if model is None else os.fspath(model)
    found = find(name, quant, pull=pull, offline=offline, ask=ask, progress=bars)
    start = time.perf_counter()
    checkpoint = None if check_tensors else kept(found, quant, mmap)
    checkpoint = checkpoint or open_checkpoint(found.path, mmap=mmap)
    if checkpoint.packed and quant not in ("none", checkpoint.packed.quant):
        raise ConfigError(
            f"--quant: {checkpoint.path} was packed with --quant {checkpoint.packed.quant}, not {quant}: "
            "leave it out, or name the model it was packed from",
            "quant",
        )
    tokenizer = load_tokenizer(checkpoint)
    architecture, config, needs, tensors = _understand(checkpoint)
    n_ctx = _context(ctx, config)
    random = None if attention == "softmax" else _features(features, feature_seed, config)
    slots = 0 if random else slots_needed(n_ctx, config.sliding_window, chunk, rewind_every)
    _check_room(config, n_ctx, slots, cache)
    if random:
        _check_features(config, random.m, min(chunk, n_ctx))
    if check_tensors:
        _check_finite(checkpoint, needs, tensors)
    _check_memory(_weight_bytes(checkpoint, needs, tensors, quant), quant, checkpoint.path)
    weights = Weights(
        needs, tensors, quant, threads, progress and partial(progress, "load"), checkpoint.packed
    )
    if keep_packed and not checkpoint.packed:
        _keep(found, checkpoint, weights)
    loaded = time.perf_counter()
    runtime = Runtime(
        config,
        weights,
        architecture,
        threads=threads,
        n_ctx=n_ctx,
        cell=state if random else cache,
        features=random,
        chunk=min(chunk, n_ctx),
        rewind_every=rewind_every,
        progress=progress and partial(progress, "compile"),
        tokenizer=tokenizer.fingerprint,
    )
    timings = {"load_s": loaded - start, "compile_s": time.perf_counter() - loaded}
    return Engine(runtime, tokenizer, found.name, found.source, timings, prefix_reuse)


def quantize(
    model: str | os.PathLike | None = None,
    *,
    quant: str = "q4",
    output: str | os.PathLike | None = None,
    threads: int | None = None,
    check_tensors: bool = False,
    pull: bool | None = None,
    offline: bool = False,
    bars: bool = False,
    progress: Callable[[str, float], None] | None = None,
) -> Path:
    """Pack a model's weights into a folder that loads at once and needs nothing of the model -> the folder.

    output: None for weights/NAME-QUANT, where `load` looks for it when asked for the model at this quant. The
    others are as for `load`; progress(phase, share) is called for "load" and "write".

    Raises what `load` does, and ConfigError if the folder holds other things or the disk does not take it.
    """
    _check_quant(quant)
    threads = check_threads(threads)
    name = None if model is None else os.fspath(model)
    found = resolve(name, pull=pull, offline=offline, progress=bars)
    checkpoint = open_checkpoint(found.path)
    if checkpoint.packed:
        raise ConfigError(
            f"{checkpoint.path}: the weights are packed already: name what they were packed from", "model"
        )
    load_tokenizer(checkpoint)  # what could not be loaded is refused now, not then
    _, _, needs, tensors = _understand(checkpoint)
    folder = place_of(found.name, quant) if output is None else Path(output)
    needed = _weight_bytes(checkpoint, needs, tensors, quant)
    check_target(folder, needed)
    if check_tensors:
        _check_finite(checkpoint, needs, tensors)
    _check_memory(needed, quant, checkpoint.path)
    load, write = (progress and partial(progress, phase) for phase in ("load", "write"))
    save(folder, checkpoint, Weights(needs, tensors, quant, threads, load), note(found, quant), write)
    return folder


def inspect(path: str | os.PathLike) -> Inspection:
    """Sizes and memory needed, from headers alone. Raises BadModelFile, UnsupportedModel."""
    checkpoint = open_checkpoint(Path(path))
    _, config, needs, tensors = _understand(checkpoint)
    quants = ("none", checkpoint.packed.quant) if checkpoint.packed else QUANTS
    per_token = RingCache.nbytes(config, 64, "f16") // 64
    return Inspection(
        path=str(path),
        model_type=config.model_type,
        config=config,
        parameters=checkpoint.n_parameters,
        file_bytes=checkpoint.nbytes,
        bytes_by_kind=checkpoint.bytes_by_kind,
        weight_bytes={quant: _weight_bytes(checkpoint, needs, tensors, quant) for quant in quants},
        cache_bytes_per_token=per_token,
    )


def _keep(found: Resolved, checkpoint: Checkpoint, weights: Weights) -> None:
    """Keep packed weights for the next start; a disk that does not take them stops nothing."""
    place = place_of(found.name, weights.quant)
    try:
        save(place, checkpoint, weights, note(found, weights.quant))
    except ConfigError as error:
        log.warning("the packed weights are not kept: %s", error)
    else:
        log.info("the packed weights are kept in %s", shown(place))


def _check_quant(quant: str) -> None:
    if quant not in QUANTS:
        raise ConfigError(f"--quant: {quant!r} is not one of {', '.join(QUANTS)}", "quant")


def _understand(checkpoint: Checkpoint):
    """The architecture, its config, what it needs and the tensors it finds, all checked together."""
    architecture = find_model(checkpoint.config, checkpoint.path)
    tensors = architecture.tensors(checkpoint.tensors)
    config = architecture.config(Fields(checkpoint.config, checkpoint.path), tensors)
    needs = architecture.needs(config, checkpoint.metadata is not None)
    check(needs, tensors, checkpoint.path)
    used = {name for need in needs.values() for name in need.names}
    extra = [name for name in tensors if name not in used and not name.endswith(architecture.IGNORED)]
    if extra:
        log.warning("%s: %d tensors are not used: %s", checkpoint.path, len(extra), ", ".join(extra[:5]))
    return architecture, config, needs, tensors


def _context(ctx: int | None, config: Config) -> int:
    """Tokens of context: what is asked for, else what the model was trained for."""
    if not ctx:
        return config.max_seq_len
    if isinstance(ctx, bool) or not isinstance(ctx, int) or ctx < 1:
        raise ConfigError(f"--ctx-size: {ctx!r} is not a number of tokens (0: the model's own)", "ctx")
    if ctx > config.max_seq_len:
        if config.rope is None:
            raise ConfigError(
                f"--ctx-size: {ctx} is more than the {config.max_seq_len} positions this model has", "ctx"
            )
        log.warning(
            "a context of %d tokens is more than the model was trained for (%d)", ctx, config.max_seq_len
        )
    return ctx


def _features(m: int | None, seed: int, config: Config) -> Features:
    """The random features of srf attention, with a warning: what they cost in fidelity."""
    features = Features(config.head_dim if m is None else m, seed)
    log.warning(
        "srf attention estimates softmax by %d random features: a model not fine-tuned for it talks nonsense "
        "(of queries and keys from N(0, 1), 64 wide, weights are off by 0.56 in total variation with 64 "
        "features, by 0.49 with 256, by 0.43 with 1024; uniform ones by 0.36)",
        features.m,
    )
    return features


def _check_finite(checkpoint: Checkpoint, needs: dict[str, Need], tensors) -> None:
    """BadModelFile naming the first tensor with a NaN or an infinity."""
    if checkpoint.packed:
        raise ConfigError(
            f"--check-tensors: {checkpoint.path} holds packed weights: check the model they were packed from",
            "check_tensors",
        )
    for name in dict.fromkeys(name for need in needs.values() for name in need.names):
        bad = np.count_nonzero(~np.isfinite(tensors[name].float32()))
        if bad:
            raise BadModelFile(tensors[name].path, f"{bad} values are NaN or infinite", name)
        tensors[name].release()


def _weight_bytes(checkpoint: Checkpoint, needs: dict[str, Need], tensors, quant: str) -> int:
    if checkpoint.packed:
        return checkpoint.packed.nbytes
    return packed_bytes(needs, tensors, quant)


def _check_memory(needed: int, quant: str, path) -> None:
    """Refuse what cannot fit the machine at all; less is the system's to manage."""
    if needed > (total := _memory()):
        raise ConfigError(
            f"{path}: the weights take {needed / 1e9:.1f} GB with --quant {quant}, and this machine has "
            f"{total / 1e9:.1f}: try --quant q4",
            "quant",
        )


def _check_room(config: Config, n_ctx: int, slots: int, cache: str) -> None:
    """Refuse a context whose cache and rotary table cannot fit the machine at all."""
    needed = RingCache.nbytes(config, slots, cache) + 4 * n_ctx * padded(config.head_dim)
    if needed > (total := _memory()):
        raise ConfigError(
            f"--ctx-size: {n_ctx} tokens take {needed / 1e9:.1f} GB of cache, and this machine has "
            f"{total / 1e9:.1f}",
            "ctx",
        )


def _check_features(config: Config, m: int, chunk: int) -> None:
    """Refuse features whose directions, two states and weights of a chunk cannot fit the machine."""
    c, d = config, padded(config.head_dim)
    floats = c.n_layers * (d + 2 * c.n_kv_heads * (d + 2)) + chunk * (c.n_heads + 3 * c.n_kv_heads)
    if (needed := 4 * m * floats) > (total := _memory()):
        raise ConfigError(
            f"--features: {m} take {needed / 1e9:.1f} GB with --batch-size {chunk}, and this machine has "
            f"{total / 1e9:.1f}",
            "features",
        )


def _memory() -> float:
    """Bytes of memory of this machine; infinite where it does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return float("inf")
