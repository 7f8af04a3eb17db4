"""What a dose does to a model, in figures: perplexity of a text, and how far the next token's odds move.

    python examples/score.py [MODEL]

`score` gives the log-probability of every token, `forward` the logits (T, V) at every position. Under a drug
both read every position beyond the sink under noise.
"""

import sys

import numpy as np

import tinydrug

TEXT = "The sea covers most of the planet. Its tides follow the moon, its currents carry warmth to the poles."


def log_softmax(logits: np.ndarray) -> np.ndarray:
    z = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


with tinydrug.load(*sys.argv[1:2]) as engine:
    ids = engine.encode(TEXT)
    sober = log_softmax(engine.forward(ids))  # (T, V)
    print(f"{len(ids)} tokens\n{'drug':<8}{'perplexity':>12}{'KL from sober':>16}{'same top token':>16}")
    for drug in ("sober", "V:0.05", "V:0.2", "V:0.8", "K:0.2", "A:0.2", "H:0.2"):
        drugged = log_softmax(engine.forward(ids, drug, drug_seed=1))
        kl = (np.exp(sober) * (sober - drugged)).sum(-1).mean()  # nats a position
        same = (sober.argmax(-1) == drugged.argmax(-1)).mean()
        perplexity = engine.score(TEXT, drug, drug_seed=1).perplexity
        print(f"{drug:<8}{perplexity:>12.2f}{kl:>16.4f}{same:>15.0%}")
