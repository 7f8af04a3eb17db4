"""Writes the golden numbers of tests/golden/models with transformers and torch; run by hand, not by tests.

    cd tests && python -m golden.make_models [--stories DIR] [--smollm2 FILE.gguf --text FILE]

needs torch and transformers, and for --smollm2 accelerate and gguf. Every pass is float32, eager attention.

    <spec>.npz       ids (T,); logits (T, V) of one forward pass over all of them; weights_crc, to tell if
                     tiny.weights still makes the same checkpoint; with dynamic rope also stepwise (T, V).
    stories260k.npz  prompt (n,) and the greedy ids (200,) that follow it, EOS not obeyed; positions (m,) in
                     the two together, and logits (m, V) there.
    smollm2.npz      see smollm2().
    sampling.npz     logits (R, V), ids (n,), and for each case of SAMPLING the scores (R, V) that processors
                     of transformers leave, -inf where a token is excluded.

Dynamic NTK is the one place where a model and its cache disagree: transformers takes the frequencies from the
current length, so one pass over 40 positions rotates position 3 by the frequencies of length 40, while token
by token it was rotated, and cached, by those of its own time. `logits` is the first, `stepwise` the second.
An engine whose rows depend on their own past alone (so that any chunking gives equal bits) does the second.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import tiny

FOLDER = Path(__file__).parent / "models"
SAMPLING = [  # keyword arguments of Sampling
    {"temperature": 1.0},
    {"temperature": 0.6},
    {"temperature": 1.7, "top_k": 12},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 1.0, "top_p": 0.05},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 1.0, "repeat_penalty": 1.3},
    {"temperature": 1.0, "repeat_penalty": 0.7, "repeat_last_n": 5},
    {"temperature": 1.0, "logit_bias": ((3, 4.0), (250, -2.5))},
    {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "min_p": 0.02, "repeat_penalty": 1.1, "repeat_last_n": 8},
]


def sampling_inputs() -> tuple[np.ndarray, np.ndarray]:
    """Logits (3, 300) float32, normal enough and without ties, and ids so far (20,), some of them twice."""
    logits = sum(tiny.uniform(f"sampling/{i}", (3, 300)) for i in range(4)).astype(np.float32)
    return logits, 20 * (tiny.counter_hash("sampling/ids", 20) % np.uint64(15)).astype(np.int64)


def hf_scores(case: dict, logits: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """logits (R, V), ids (n,) -> scores (R, V) after transformers' processors in tinydrug's order."""
    import torch
    from transformers.generation import logits_process as hf

    scores = torch.from_numpy(logits)
    recent = torch.from_numpy(ids[-case.get("repeat_last_n", 64) :]).expand(len(logits), -1)
    chain = {
        "repeat_penalty": hf.RepetitionPenaltyLogitsProcessor,
        "logit_bias": lambda bias: hf.SequenceBiasLogitsProcessor([[[i], b] for i, b in bias]),
        "top_k": hf.TopKLogitsWarper,
        "top_p": hf.TopPLogitsWarper,
        "min_p": hf.MinPLogitsWarper,
        "temperature": hf.TemperatureLogitsWarper,
    }
    for name, make in chain.items():
        if name in case:
            scores = make(case[name])(recent, scores)
    return scores.numpy()


def load(folder: Path, **options):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", **options
    )
    return model.eval()


def forward(model, ids: np.ndarray) -> np.ndarray:
    """ids (T,) -> logits (T, V) float32 of one pass."""
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(ids)[None], use_cache=False).logits[0].numpy()


def stepwise(model, ids: np.ndarray) -> np.ndarray:
    """ids (T,) -> logits (T, V) float32 of T passes of one token each, with a cache."""
    import torch
    from transformers import DynamicCache

    cache, rows = DynamicCache(config=model.config), []
    with torch.no_grad():
        for token in torch.from_numpy(ids):
            rows.append(model(token.view(1, 1), past_key_values=cache, use_cache=True).logits[0, 0].numpy())
    return np.stack(rows)


def tiny_model(name: str, folder: Path) -> None:
    ids, model = tiny.ids(name), load(tiny.build(name, folder))
    made = {"ids": ids, "logits": forward(model, ids), "weights_crc": tiny.weights_crc(name)}
    steps = stepwise(load(folder), ids)
    if "dynamic" in name:
        made["stepwise"] = steps
    else:
        np.testing.assert_allclose(steps, made["logits"], atol=2e-5)
    save(name, **made)


def stories260k(folder: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    model = load(folder)
    prompt = [1, *SentencePieceProcessor(str(folder / "tokenizer.model")).encode("Once upon a time, Tim")]
    ids = list(prompt)
    for _ in range(200):
        ids.append(int(forward(model, np.array(ids))[-1].argmax()))
    logits = forward(model, np.array(ids))
    top = np.sort(logits[len(prompt) - 1 : -1], -1)
    print(f"stories260k: the closest call of 200 was decided by {(top[:, -1] - top[:, -2]).min():.1e}")
    positions = np.array([0, 1, 5, 17, 40, 99, 150, 199])
    save(
        "stories260k", prompt=prompt, greedy=ids[len(prompt) :], positions=positions, logits=logits[positions]
    )


def smollm2(file: Path, text: str) -> None:
    """The real GGUF, dequantised by transformers, on the first tokens of a real text.

    ids (2000,); of the first 200 alone: positions (4,) and logits (4, V) there, top_ids and top_logits
    (200, 32), best first, logsumexp (200,) float64; of all: nll (1999,) float64 of next ids, perplexity ().
    """
    from transformers import AutoTokenizer

    model = load(file.parent, gguf_file=file.name)
    check_dequantised(model, file)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    split_digits(tokenizer)
    ids = np.array(tokenizer(text[:20000])["input_ids"][:2000])

    logits = forward(model, ids[:200])
    best = np.argsort(-logits, kind="stable")[:, :32]
    positions = np.array([0, 10, 77, 199])
    wide = forward(model, ids).astype(np.float64)
    nll = logsumexp(wide[:-1]) - wide[np.arange(1999), ids[1:]]
    print(f"smollm2: perplexity {np.exp(nll.mean()):.6f} over {nll.size} tokens")
    save(
        "smollm2",
        ids=ids.astype(np.uint16),
        positions=positions,
        logits=logits[positions],
        top_ids=best.astype(np.uint16),
        top_logits=np.take_along_axis(logits, best, -1),
        logsumexp=logsumexp(logits.astype(np.float64)),
        nll=nll,
        perplexity=np.exp(nll.mean()),
    )


def check_dequantised(model, file: Path) -> None:
    """Every weight transformers made of the GGUF is what the gguf library dequantises it to, bit for bit."""
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(file).tensors}
    seen = set()
    for name, parameter in model.named_parameters():
        stem, kind = name.rsplit(".", 1)
        seen.add(key := f"{names.get_name(stem)}.{kind}")
        w = tensors[key]
        heads = {"attn_q": model.config.num_attention_heads, "attn_k": model.config.num_key_value_heads}
        if n := heads.get(
            key.split(".")[-2]
        ):  # GGUF keeps rotated pairs adjacent; transformers keeps them apart
            w = w.reshape(n, -1, 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)
        np.testing.assert_array_equal(parameter.detach().numpy(), w, err_msg=name)
    assert seen == set(tensors), seen ^ set(tensors)


def split_digits(tokenizer) -> None:
    """Set the pre-tokenizer of SmolLM2's tokenizer.json; the one made of a GGUF does not split digits."""
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def logsumexp(x: np.ndarray) -> np.ndarray:
    peak = x.max(-1)
    return peak + np.log(np.exp(x - peak[:, None]).sum(-1))


def save(name: str, **arrays) -> None:
    FOLDER.mkdir(exist_ok=True)
    np.savez_compressed(FOLDER / f"{name}.npz", **arrays)
    print(f"{name}.npz: {(FOLDER / f'{name}.npz').stat().st_size:,} bytes")


def main() -> None:
    import torch

    torch.set_num_threads(1)
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--stories", type=Path, help="folder of stories260k")
    arguments.add_argument("--smollm2", type=Path, help="SmolLM2-135M-Instruct.Q4_1.gguf")
    arguments.add_argument("--text", type=Path, help="a UTF-8 text of 2,000 tokens or more")
    chosen = arguments.parse_args()
    if bool(chosen.smollm2) != bool(chosen.text):
        arguments.error("--smollm2 and --text belong together")

    logits, ids = sampling_inputs()
    scores = {f"case{i}": hf_scores(case, logits, ids) for i, case in enumerate(SAMPLING)}
    save("sampling", logits=logits, ids=ids, **scores)
    with tempfile.TemporaryDirectory() as folder:
        for name in tiny.SPECS:
            tiny_model(name, Path(folder) / name)
    if chosen.stories:
        stories260k(chosen.stories)
    if chosen.smollm2:
        smollm2(chosen.smollm2, chosen.text.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
