"""Long work, item by item: how much is done, how long the rest will take, and what Ctrl-C leaves."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")
Progress = Callable[[int, int, float], None]  # (done, total, seconds left)


class Work(Generic[Item]):
    """Iterate over items, each with its share of the work; `complete` tells whether the end was reached.

    progress(done, total, seconds left) is called before the first item and after each. It may raise
    KeyboardInterrupt: then the loop ends there, and what is done is kept.
    """

    def __init__(
        self,
        items: Sequence[Item],
        progress: Progress | None = None,
        share: Callable[[Item], int] = lambda item: 1,
    ):
        self.items, self.complete = items, not items
        self._progress, self._share = progress or (lambda done, total, left: None), share

    def __iter__(self) -> Iterator[Item]:
        total, done, start = sum(map(self._share, self.items)), 0, time.monotonic()
        try:
            self._progress(0, total, float("nan"))
            for i, item in enumerate(self.items):
                yield item
                done += self._share(item)
                self.complete = i == len(self.items) - 1
                self._progress(done, total, (time.monotonic() - start) * (total - done) / max(done, 1))
        except KeyboardInterrupt:
            return


def estimating(progress: Progress) -> Callable[[int, int], None]:
    """For work that tells (done, total) alone: the rest takes as long, item by item, as what is done."""
    start = time.monotonic()

    def tell(done: int, total: int) -> None:
        left = (time.monotonic() - start) / done * (total - done) if done else float("nan")
        progress(done, total, left)

    return tell


def spoken(seconds: float) -> str:
    """A duration in words as short as a bar needs: 8 s, 2:05 min, 1:10 h; nothing if it is not known."""
    if seconds != seconds:
        return ""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{int(seconds) // 60}:{int(seconds) % 60:02} min"
    return f"{int(seconds) // 3600}:{int(seconds) % 3600 // 60:02} h"
