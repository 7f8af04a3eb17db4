"""What noise costs in decoding: a token's time under it against sober, at every site, by every law.

    python -m bench.overhead [--shape smollm2-135m:q4] [-d 4096]

All layers are dosed; contexts hold 512 tokens and --depth. Sober and drugged tokens take turns, eight of
each, and medians over single tokens are compared.
"""

import argparse
import statistics
from collections.abc import Iterable
from itertools import product

from bench.card import Row, run
from bench.ours import Ours
from bench.synthetic import gguf_model, scratch_folder
from tinydrug.noise.laws import LAWS

SHORT = 512  # tokens
TURN = 8  # tokens before the other one's turn
READ = {  # times a sober token, by law: the targets of K and V after a short context, and after a long one
    "sign": (1.03, 1.08),
    "uniform": (1.05, 1.15),
    "gauss": (1.08, 1.25),
}
TARGETS = dict.fromkeys(("H", "Q", "pK", "A"), dict.fromkeys(READ, (1.03, 1.03))) | {"K": READ, "V": READ}


def measure(args: argparse.Namespace) -> Iterable[Row]:
    depths = sorted({min(SHORT, args.depth), args.depth})
    with scratch_folder(args.scratch) as scratch:
        for spec in args.shape or ["smollm2-135m:q4"]:
            with Ours(gguf_model(spec, scratch), args.threads, depths[-1] + TURN) as ours:
                for depth, site, law in product(depths, TARGETS, READ):
                    drugged, sober = _times(ours, depth, f"{site}:0.05{LAWS[law].mark}", args.rounds)
                    target = TARGETS[site][law][depth > SHORT]
                    what = f"{spec} {site} {law} after {depth}"
                    yield Row(what, 1e3 * drugged, "ms/token", "sober", 1e3 * sober, most=target)


def _times(ours: Ours, depth: int, drug: str, rounds: int) -> tuple[float, float]:
    """Median seconds of a token under a drug, and of one without."""
    ours.decode(1, depth, drug)  # compiles the law
    times = {drug: [], None: []}
    for _ in range(rounds):
        for each, seconds in times.items():
            seconds += ours.token_seconds(TURN, depth, each)
    return statistics.median(times[drug]), statistics.median(times[None])


if __name__ == "__main__":
    run(__doc__, measure)
