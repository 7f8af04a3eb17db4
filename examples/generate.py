"""Text under noise, as it is made: the same beginning sober, and with three seeds of one dose.

    python examples/generate.py [MODEL]

Greedy throughout: all variety comes from the noise. The same seed gives the same text again.
"""

import sys

import tinydrug

PROMPT = "The sea is"
DRUG = "V:1@0.2..0.8"  # in the middle layers, turn cached values by up to 1 radian whenever they are read

with tinydrug.load(*sys.argv[1:2]) as engine:
    schedule = tinydrug.Schedule.parse(DRUG)
    print(schedule.describe(engine.config.n_layers))
    for drug, seed in ((None, 0), (schedule, 1), (schedule, 2), (schedule, 3)):
        print(f"\n{f'seed {seed}' if drug else 'sober'}: {PROMPT}", end="")
        with engine.stream(PROMPT, n=32, drug=drug, drug_seed=seed) as stream:
            for step in stream:
                print(step.text, end="", flush=True)
        print(f"\n  ({sum(stream.completion.moved.values()):,} vectors moved)")
