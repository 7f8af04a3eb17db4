"""The last sequence an engine wrote for itself, kept for a prompt that begins like it."""

from collections import deque
from collections.abc import Sequence
from contextlib import suppress

from tinydrug.engine.session import Session


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many first tokens two sequences share."""
    for i, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return i
    return min(len(one), len(other))


class Prefix:
    """At most one sequence; whoever takes it owns it, so threads never meet in it. Off: none is ever kept."""

    def __init__(self, on: bool):
        self._kept: deque[Session] = deque(maxlen=int(on))  # its methods are atomic

    def keep(self, *sessions: Session) -> None:
        """Remember the last of these sequences, which are no longer used, in place of the one before."""
        self._kept.extend(sessions)

    def clear(self) -> None:
        self._kept.clear()

    def share(self, session: Session, prompt: Sequence[int]) -> None:
        """Let a new session inherit from the kept one."""
        with suppress(IndexError):
            inherit(session, self._kept.pop(), prompt)


def inherit(session: Session, kept: Session, prompt: Sequence[int]) -> None:
    """Give a new session the rows of one no longer used that its prompt begins with, all but the last token.

    Only rows that are as if never drugged, and only if the prompt would be read without noise here: then
    every bit is as if the prompt had been read anew, whatever the schedules and seeds.
    """
    if session.schedule.is_sober or session.schedule.prompt != "all":
        with suppress(ValueError):  # the ring has moved on
            session.adopt(kept, common(kept.ids[: kept.clean], prompt[:-1]))
