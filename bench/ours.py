"""tinydrug as a contender among its peers."""

import time
from functools import cache
from pathlib import Path

import numpy as np

import tinydrug
from tinydrug.cli.bench import Test, sample, turn_to
from tinydrug.noise import Schedule


class Ours:
    """An engine, and a sequence of random tokens for each depth asked for. Speeds are tokens a second.

    Packed weights are copied into memory: mapped, their speed depends on the file system's pages."""

    def __init__(self, path: str | Path | None, threads: int, ctx: int, **options):
        self.engine = tinydrug.load(path, threads=threads, ctx=ctx, rewind_every=0, mmap=False, **options)
        self.ids = np.random.default_rng(0).integers(0, self.engine.config.vocab_size, ctx).tolist()
        self._session = cache(lambda depth: self.engine.session(drug_seed=1))  # its cache is filled once

    def __enter__(self) -> "Ours":
        return self

    def __exit__(self, *exception) -> None:
        self.engine.close()

    @property
    def bytes_per_token(self) -> int:
        """Bytes of weights that decoding a token reads."""
        return self.engine.runtime.bytes_per_token

    @property
    def weights(self) -> np.ndarray:
        """The piece of memory that all weights lie in."""
        return next(iter(self.engine.runtime.weights.areas.values())).base

    def prefill(self, n: int) -> float:
        """Of a prompt of n, of which the last token's logits are asked for."""
        return 1e9 * n / sample(self._dosed(0, None), Test(n, 0), 0, self.ids)

    def prefill_all(self, n: int) -> float:
        """Of a prompt of n, of which all logits are asked for."""
        session = self._dosed(0, None)
        turn_to(session, 0, self.ids)
        start = time.perf_counter()
        session.feed(self.ids[:n], outputs=n)
        return n / (time.perf_counter() - start)

    def decode(self, n: int, depth: int = 0, drug: str | None = None) -> float:
        """Of n tokens after so many others."""
        return 1e9 * n / sample(self._dosed(depth, drug), Test(0, n), depth, self.ids)

    def token_seconds(self, n: int, depth: int, drug: str | None) -> list[float]:
        """What each of n tokens took after so many others."""
        session, seconds = self._dosed(depth, drug), []
        turn_to(session, depth, self.ids)
        for token in self.ids[depth : depth + n]:
            start = time.perf_counter()
            session.feed([token], "all")
            seconds.append(time.perf_counter() - start)
        return seconds

    def _dosed(self, depth: int, drug: str | None):
        """The sequence for this depth, under this noise from now on."""
        session = self._session(depth)
        session.dose(Schedule.parse(drug))
        return session
