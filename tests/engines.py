"""Tiny models made to run: a runtime for a checkpoint, a tokenizer to go with it, and feeding in pieces."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from tinydrug.engine.runtime import Runtime
from tinydrug.engine.session import Session
from tinydrug.formats.checkpoint import open_checkpoint
from tinydrug.formats.config import Fields
from tinydrug.formats.weights import Weights, check
from tinydrug.models import find_model
from tinydrug.noise import SOBER, Schedule


def runtime(
    path, quant="none", threads=2, n_ctx=None, cell="f32", features=None, chunk=128, rewind_every=0
) -> Runtime:
    """A runtime for a checkpoint, without what `load` adds: no tokenizer, any number of threads."""
    checkpoint = open_checkpoint(path)
    architecture = find_model(checkpoint.config, path)
    tensors = architecture.tensors(checkpoint.tensors)
    config = architecture.config(Fields(checkpoint.config, path), tensors)
    needs = architecture.needs(config, checkpoint.metadata is not None)
    check(needs, tensors, path)
    weights = Weights(needs, tensors, quant, threads, packed=checkpoint.packed)
    return Runtime(
        config,
        weights,
        architecture,
        threads=threads,
        n_ctx=n_ctx or config.max_seq_len,
        cell=cell,
        features=features,
        chunk=chunk,
        rewind_every=rewind_every,
    )


def session(run: Runtime, drug=None, seed: int = 0) -> Session:
    return Session(run, SOBER if drug is None else Schedule.parse(drug), seed)


def feed(sequence: Session, ids, piece: int | None = None, drugged: str = "none") -> np.ndarray:
    """ids (T,) fed in pieces of so many tokens -> logits (T, V) of all of them."""
    ids = [int(i) for i in ids]
    piece = piece or len(ids)
    pieces = [ids[at : at + piece] for at in range(0, len(ids), piece)]
    return np.concatenate([sequence.feed(part, drugged, len(part)) for part in pieces])


def logits(run: Runtime, ids, drug=None, seed: int = 0, piece: int | None = None) -> np.ndarray:
    """Logits (T, V) of a fresh sequence: every position sober, or with a drug every position under it."""
    return feed(session(run, drug, seed), ids, piece, "none" if drug is None else "all")


def cached(sequence: Session) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values (L, G, T, d) that a sequence has cached, d padded; not for a ring that has wrapped."""
    keys, values, T = sequence.cache.keys, sequence.cache.values, sequence.pos
    L, G, groups, d, lanes = keys.shape
    return keys.swapaxes(3, 4).reshape(L, G, groups * lanes, d)[:, :, :T], values[:, :, :T]


def edited(source: Path, folder: Path, change=lambda tensors: tensors, **fields) -> Path:
    """A copy of a one-file checkpoint with its tensors changed, and fields of its config replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((source / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))
    save_file(change(load_file(source / "model.safetensors")), folder / "model.safetensors")
    return folder


ALPHABET = ["<unk>", "<s>", "</s>", "Ġ", "Ċ", "Ã", "©", *map(chr, range(33, 122))]  # "Ã©" is é in two bytes


def add_tokenizer(folder: Path, template: str | None = None) -> Path:
    """A byte-level tokenizer of 96 ids, one a character, BOS 1 and EOS 2, into a model folder."""
    special = [
        {"id": i, "content": ALPHABET[i], "special": True, "normalized": False}
        | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        for i in range(3)
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    model = {"type": "BPE", "vocab": {token: i for i, token in enumerate(ALPHABET)}, "merges": []}
    tokenizer = {"version": "1.0", "added_tokens": special, "normalizer": None, "pre_tokenizer": byte_level}
    tokenizer |= {"post_processor": byte_level, "decoder": byte_level, "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    if template is not None:
        names["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder
