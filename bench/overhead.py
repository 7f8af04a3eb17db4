"""What noise costs in decoding: a token's time under it against sober, at every site, by every law.

    python -m bench.overhead [--shape smollm2-135m:q4] [-d 4096]

All layers are dosed; contexts hold 512 tokens and --depth. Sober and drugged tokens take turns, eight of
each, and medians over single tokens are compared.
"""

import argparse
import statistics
from collections.abc import Iterable
from itertools import product
from pathlib import Path

from bench.card import Row, run
from bench.ours import Ours
from bench.synthetic import our_model, scratch_folder
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
            model = our_model(spec, scratch)
            for depth in depths:
                for site, law, drugged, sober in _times(model, depth, args):
                    target = TARGETS[site][law][depth > SHORT]
                    what = f"{spec} {site} {law} after {depth}"
                    yield Row(what, 1e3 * drugged, "ms/token", "sober", 1e3 * sober, most=target)


def _times(model: Path, depth: int, args: argparse.Namespace) -> Iterable[tuple[str, str, float, float]]:
    """Median seconds of a token under each drug, and of one without: (site, law, drugged, sober).

    Two engines: each chooses how many threads to use by how long its own tokens take. They change places half
    way: one's cache may lie in memory that reads some percent slower."""
    with Ours(model, args.threads, depth + TURN) as one, Ours(model, args.threads, depth + TURN) as other:
        for site, law in product(TARGETS, READ):
            drug = f"{site}:0.05{LAWS[law].mark}"
            drugged, sober = [], []
            for dosed, plain in (one, other), (other, one):
                dosed.token_seconds(TURN, depth, drug)  # compiles the law, and settles
                plain.token_seconds(TURN, depth, None)
                for _ in range((args.rounds + 1) // 2):
                    drugged += dosed.token_seconds(TURN, depth, drug)
                    sober += plain.token_seconds(TURN, depth, None)
            yield site, law, statistics.median(drugged), statistics.median(sober)


if __name__ == "__main__":
    run(__doc__, measure)
