"""Several doses in one batch: eight sequences, each with its own, decoded in one forward pass a token.

    python examples/batch.py [MODEL]

Every sequence comes out exactly as it would alone.
"""

import sys

import tinydrug

PROMPT = "Once upon a time"
DOSES = ("sober", "H:0.2", "Q:0.8", "pK:0.5", "K:0.8", "V:0.8", "A:0.3", "K:0.5,V:0.5")

with tinydrug.load(*sys.argv[1:2]) as engine:
    results = engine.generate(prompts=[PROMPT] * len(DOSES), drug=DOSES, drug_seed=1, n=24)
    for result in results:
        print(f"{str(result.schedule):<12} {PROMPT}{result.text}".replace("\n", " "))

    timings = results[0].timings  # of the batch
    print(f"\n{timings['decode_tokens'] / timings['decode_s']:.0f} tokens a second together")

    alone = engine.generate(PROMPT, drug=DOSES[-1], drug_seed=1 + 7, n=24)  # sequence 7 of the batch
    print("the last one alone is", "the same" if alone.ids == results[-1].ids else "different")
