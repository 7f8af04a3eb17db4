"""What quantising costs: perplexity and KL from float32, ours and llama.cpp's, of the same weights and text.

    python -m bench.quality --llama-bench PATH --text FILE

The weights are those of the default model, in float32: its 4 bits are blurred within their steps by uniform
noise, or whatever has the same levels would find them again. llama.cpp (llama-quantize and llama-perplexity,
beside llama-bench) makes Q8_0, Q4_0, IQ4_NL and Q4_K_M of them; in Q4_K_M, rows that 256 does not divide have
5 and 8 bits. Texts are pieces of 512 tokens; second halves are scored, as llama-perplexity does it. The KL is
that of each engine's own float32 from its quantised weights, in nats a token; "same top" is the share of
tokens whose likeliest successor stays.
"""

import argparse
import json
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np

import tinydrug
from bench.card import card, described, read_flags, show
from bench.synthetic import scratch_folder
from tinydrug.engine.sampling import log_softmax
from tinydrug.hub import resolve

PIECE = 512  # tokens; llama-perplexity scores those after the first half
KINDS = ("Q8_0", "Q4_0", "IQ4_NL", "Q4_K_M")
COLUMNS = ["engine", "weights", "bits a weight", "perplexity", "KL", "same top"]


class Quality(NamedTuple):
    """Of quantised weights: over the scored tokens of a text."""

    engine: str
    weights: str
    bits: float  # a parameter, scales included
    perplexity: float
    kl: float | None  # nats a token, from float32
    top: float | None  # share of tokens with the same likeliest successor

    def cells(self) -> list[str]:
        kl = "" if self.kl is None else f"{self.kl:.4f}"
        top = "" if self.top is None else f"{self.top:.1%}"
        return [self.engine, self.weights, f"{self.bits:.2f}", f"{self.perplexity:.3f}", kl, top]


def main() -> None:
    args = read_flags(__doc__, _add_flags)
    about, pieces = card(args.threads), 1 if args.quick else args.pieces
    print(described(about), flush=True)
    with scratch_folder(args.scratch) as scratch:
        whole = scratch / "blurred-f32.gguf"
        if not whole.exists():
            blur(resolve(args.model).path, whole)
        found = []
        if args.llama_bench:
            found += theirs(Path(args.llama_bench), whole, args.text, pieces, args.threads)
        found += ours(whole, args.text, pieces, args.threads)
    title = f"{pieces} pieces of {PIECE} tokens of {args.text.name}"
    show(title, COLUMNS, [quality.cells() for quality in found])
    print(json.dumps({"card": about, "pieces": pieces, "rows": [quality._asdict() for quality in found]}))


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", type=Path, required=True, help="a file of plain text")
    parser.add_argument("--pieces", type=int, default=8, help=f"of {PIECE} tokens")


def blur(source: Path, target: Path) -> None:
    """A GGUF in float32: matrices of few bits are blurred within their steps."""
    reader, rng = gguf.GGUFReader(source), np.random.default_rng(0)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        inner = field.types[1] if len(field.types) > 1 else None
        writer.add_key_value(field.name, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if tensor.tensor_type not in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.Q8_0):
            values += _steps(values) * rng.uniform(-0.5, 0.5, values.shape).astype(np.float32)
        writer.add_tensor(tensor.name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _steps(values: np.ndarray) -> np.ndarray:
    """The least distance between two different values of every block of 32."""
    blocks = np.sort(values.reshape(-1, 32), axis=1)
    apart = np.diff(blocks, axis=1)
    apart = np.where(apart > 0.01 * np.abs(blocks).max(1, keepdims=True), apart, np.inf).min(1)
    return np.repeat(np.where(np.isfinite(apart), apart, 0), 32).reshape(values.shape)


def theirs(bench: Path, whole: Path, text: Path, pieces: int, threads: int) -> list[Quality]:
    """llama.cpp's figures; the quantised files stay beside `whole`."""
    base, found = whole.with_suffix(".logits"), []
    perplexity = [bench.with_name("llama-perplexity"), "-f", text, "-c", PIECE, "--chunks", pieces]
    perplexity += ["-t", threads, "--kl-divergence-base", base]
    found.append(_told("F32", whole, _run([*perplexity, "-m", whole])))
    for kind in KINDS:
        path = whole.with_name(f"blurred-{kind}.gguf")
        if not path.exists():
            _run([bench.with_name("llama-quantize"), whole, path, kind, threads])
        found.append(_told(kind, path, _run([*perplexity, "-m", path, "--kl-divergence"])))
    base.unlink()
    return found


def _run(words: list) -> str:
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _told(kind: str, path: Path, output: str) -> Quality:
    def number(pattern):
        match = re.search(pattern + r"\s*[:=]\s*([0-9.]+)", output)
        return float(match[1]) if match else None

    top = number("Same top p")
    return Quality(
        "llama.cpp",
        kind,
        _bits(path),
        number(r"Mean PPL\(Q\)") or number("Final estimate: PPL"),
        number("Mean    KLD"),
        None if top is None else top / 100,
    )


def _bits(path: Path) -> float:
    tensors = gguf.GGUFReader(path).tensors
    return 8 * sum(int(t.n_bytes) for t in tensors) / sum(int(t.n_elements) for t in tensors)


def ours(whole: Path, text: Path, pieces: int, threads: int) -> list[Quality]:
    """Our figures: of float32, of what --quant makes of it, and of llama.cpp's files, run as they are."""
    runs = [("f32", whole, "none"), ("--quant q8", whole, "q8"), ("--quant q4", whole, "q4")]
    runs += [(f"its {kind}", whole.with_name(f"blurred-{kind}.gguf"), "none") for kind in KINDS]
    reference, found = None, []
    for name, path, quant in runs:
        if not path.exists():
            continue
        with tinydrug.load(path, quant=quant, threads=threads, ctx=PIECE) as engine:
            ids = engine.encode(text.read_text())
            parameters = tinydrug.inspect(path).parameters
            bits = 8 * engine.runtime.weights.nbytes / parameters
            logs = [_log_likelihoods(engine, ids[i * PIECE : (i + 1) * PIECE]) for i in range(pieces)]
        if reference is None:
            reference = logs
        after = [np.array(ids[i * PIECE + PIECE // 2 + 1 : (i + 1) * PIECE]) for i in range(pieces)]
        surprise = [-log[np.arange(len(next_)), next_] for log, next_ in zip(logs, after, strict=True)]
        kl = [(np.exp(p) * (p - q)).sum(-1) for p, q in zip(reference, logs, strict=True)]
        top = [p.argmax(-1) == q.argmax(-1) for p, q in zip(reference, logs, strict=True)]
        perplexity, is_f32 = float(np.exp(np.concatenate(surprise).mean())), name == "f32"
        found.append(
            Quality(
                "tinydrug",
                name,
                bits,
                perplexity,
                None if is_f32 else float(np.concatenate(kl).mean()),
                None if is_f32 else float(np.concatenate(top).mean()),
            )
        )
    return found


def _log_likelihoods(engine, ids: list[int]) -> np.ndarray:
    """(n / 2 - 1, V) float64: of the tokens of the second half, each but its first."""
    session, half = engine.session(), PIECE // 2
    session.feed(ids[:half])
    return log_softmax(session.feed(ids[half:-1], outputs=half - 1))


if __name__ == "__main__":
    main()
