"""Whether laws of noise are alike: KL from sober, by site and law, at equal angle, on a real text.

    python -m bench.noise [--model smollm2.gguf] [--theta 0.2] [--seeds 16]

The text is read under noise at every position (teacher forcing) and held against the sober reading of the
same positions. Every seed gives a mean over tokens; the seeds are independent, so their spread is the error
of the mean over seeds. `gauss` and `sign` are isotropic and must have the same mean, at angles where higher
moments do not count (at K they do at 0.5): z is their difference in standard errors, and over all sites the
sum of z^2 is held against chi^2. `uniform` pushes everything one way: it need not agree, and is shown beside
them.
"""

import argparse
import json
import math
import statistics
from pathlib import Path

import numpy as np

import tinydrug
from bench.card import card, described, read_flags, show
from tinydrug.api import REFERENCE
from tinydrug.engine.forced import divergence, read
from tinydrug.noise import SITES
from tinydrug.noise.laws import LAWS

TOGETHER = 8  # sequences read in one pass


def main() -> None:
    args = read_flags(__doc__, _add_flags)
    about = card(args.threads)
    print(described(about), flush=True)
    seeds, tokens = (2, 32) if args.quick else (args.seeds, args.tokens)
    rows, zs = [], []
    with tinydrug.load(args.model, threads=args.threads, ctx=max(tokens, 512)) as engine:
        ids = engine.encode((args.text or REFERENCE).read_text())[:tokens]
        for site in SITES:
            means = {law: _means(engine, ids, f"{site}:{args.theta}{LAWS[law].mark}", seeds) for law in LAWS}
            figures = {law: (statistics.mean(each), _error(each)) for law, each in means.items()}
            gap = figures["sign"][0] - figures["gauss"][0]
            zs.append(gap / math.hypot(figures["sign"][1], figures["gauss"][1]))
            rows.append([site, *(f"{mean:.5f} ± {error:.5f}" for mean, error in figures.values())])
            rows[-1] += [f"{figures['sign'][0] / figures['gauss'][0]:.3f}", f"{zs[-1]:+.2f}"]
    show(
        f"mean KL(sober || drugged), nats a token: theta {args.theta}, {seeds} seeds, {len(ids)} tokens",
        ["site", *LAWS, "sign/gauss", "z"],
        rows,
    )
    total, chance = sum(z * z for z in zs), _chi2_tail(sum(z * z for z in zs), len(zs))
    print(f"sign against gauss: sum of z^2 {total:.1f} for {len(zs)} sites, by chance with p = {chance:.2f}")
    print(json.dumps({"card": about, "theta": args.theta, "seeds": seeds, "tokens": len(ids), "rows": rows}))


def _add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--theta", type=float, default=0.2, help="largest angle in radians")
    add("--seeds", type=int, default=16)
    add("--tokens", type=int, default=256, help="of the text")
    add("--text", type=Path, help="a file (default: the reference text)")


def _means(engine, ids: list[int], drug: str, seeds: int) -> list[float]:
    """The mean KL over the positions that are noisy, for each seed."""
    sink, found = tinydrug.Schedule.parse(drug).sink, []
    for first in range(0, seeds, TOGETHER):
        drugged = [engine.session(drug, seed) for seed in range(first, min(seeds, first + TOGETHER))]
        pieces = [divergence(logits[0], logits[1:]) for _, logits in read([engine.session(), *drugged], ids)]
        found += np.concatenate(pieces, axis=1)[:, sink:].mean(1).tolist()
    return found


def _error(samples: list[float]) -> float:
    """The standard error of their mean."""
    return statistics.stdev(samples) / math.sqrt(len(samples))


def _chi2_tail(x: float, degrees: int) -> float:
    """The probability that chi^2 with so many degrees of freedom exceeds x."""
    if degrees % 2:  # erfc and then every second term of the recurrence
        tail, term = math.erfc(math.sqrt(x / 2)), math.sqrt(2 * x / math.pi) * math.exp(-x / 2)
        steps = range(3, degrees + 1, 2)
    else:
        tail, term = math.exp(-x / 2), x / 2 * math.exp(-x / 2)
        steps = range(4, degrees + 1, 2)
    for k in steps:
        tail, term = tail + term, term * x / k
    return tail


if __name__ == "__main__":
    main()
