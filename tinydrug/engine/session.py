"""One sequence: its cache, its tokens, its schedule of noise."""

import copy
import os
from collections.abc import Callable, Sequence
from numbers import Integral

import numpy as np

from tinydrug.engine import snapshot
from tinydrug.engine.checks import whole, wholes
from tinydrug.engine.doses import dose_table, term_table
from tinydrug.engine.history import Noise, Write, cut, note
from tinydrug.engine.runtime import Part, Runtime
from tinydrug.errors import ConfigError, ContextOverflow, DrugError, PromptError
from tinydrug.formats.weights import padded
from tinydrug.noise import COUNTED, SITES, SOBER, Schedule
from tinydrug.noise.checks import shown
from tinydrug.noise.schedule import MAX_SEED, PROMPTS


class Session:
    """A sequence being read and written. Sessions of one runtime may be used from any thread, one call at a
    time each."""

    def __init__(self, runtime: Runtime, schedule: Schedule = SOBER, noise_seed: int = 0):
        self.runtime = runtime
        self.cache = runtime.new_cache()
        self.ids: list[int] = []  # every token in the cache, in order
        self.moved = np.zeros(len(COUNTED), np.int64)  # vectors that noise has moved, by site or term
        self.rewind_every = runtime.rewind_every
        self.spans: list[tuple[int, int]] = []  # positions first .. last - 1 that were written under noise
        self._clean: int | None = None  # rows before this are as if never drugged; None: all are
        self.history: list[Write] = []  # how the others were written
        self.born = 0  # position of the first token generated after the last prompt: ramps count from it
        self._sums: np.ndarray | None = None  # (threads, sites, 3) of a verification
        self._protected_positions: tuple[int, ...] = ()
        self._protected_ids: tuple[int, ...] = ()
        self.awake = np.zeros(padded(runtime.n_ctx, 16) + 17, np.int32)  # unprotected positions before each
        self._written = 0  # positions ever written since the last reset: which slots are spoilt
        self.dose(schedule, noise_seed)

    @property
    def pos(self) -> int:
        """The position of the next token."""
        return len(self.ids)

    def dose(self, schedule: Schedule, noise_seed: int | None = None) -> None:
        """Use this schedule from now on; its own seed wins over noise_seed. DrugError if it does not fit the
        model."""
        if not isinstance(schedule, Schedule):
            raise DrugError(f"schedule must be a Schedule, not {shown(schedule)}: Schedule.parse reads text")
        if noise_seed is not None:
            noise_seed = whole(noise_seed, "noise_seed", 0, MAX_SEED)
        doses = dose_table(schedule, self.runtime.config.n_layers, self.runtime.cell)
        if self.runtime.features and doses["theta"][:, [SITES["K"].code, SITES["V"].code]].any():
            raise DrugError(
                "noise at K and V is drawn in cached keys and values at each read, and srf attention keeps "
                "none: dose H, Q, pK, A or M, or use --attention softmax"
            )
        self.doses, self.terms = doses, term_table(schedule, self.runtime.config)
        self._dosed = bool(doses["theta"].any() or self.terms.view("f8").any())
        self.schedule = schedule
        self.protect(self._protected_positions, self._protected_ids)
        if schedule.seed is not None:
            noise_seed = schedule.seed
        if noise_seed is not None:
            self.noise_seed = int(np.uint64(noise_seed).astype(np.int64))  # 64 bits, as the kernels hold them

    def protect(self, positions: Sequence[int] = (), ids: Sequence[int] = ()) -> None:
        """Positions, and tokens wherever they stand, that noise never touches, beside the sink."""
        positions, ids = wholes(positions, "positions"), wholes(ids, "ids")
        self._protected_positions, self._protected_ids = positions, ids
        self._touchable = np.arange(len(self.awake) - 1) >= self.schedule.sink
        self._touchable[[p for p in positions if p < len(self._touchable)]] = False
        self._mark(self.ids, 0)

    def _mark(self, ids: Sequence[int], start: int) -> None:
        """Note which of these tokens, from this position on, are protected by their ids."""
        here = self._touchable.copy() if not start else np.diff(self.awake).astype(bool)
        if self._protected_ids:
            end = start + len(ids)
            here[start:end] = self._touchable[start:end] & ~np.isin(ids, self._protected_ids)
        np.cumsum(here, dtype=np.int32, out=self.awake[1:])

    def verify(self, wanted: bool) -> None:
        """Start (from zero) or stop measuring what noise does to vectors; it costs some time."""
        self._sums = np.zeros((self.runtime.threads, len(SITES), 3)) if wanted else None

    @property
    def measured(self) -> int:
        """Address of the sums being measured, 0 if none are."""
        return 0 if self._sums is None else self._sums.ctypes.data

    def verified(self) -> dict[str, tuple[int, float, float]]:
        """By site: vectors measured, mean angle to where they were (radians), mean log of the norm ratio."""
        sums = np.zeros((len(SITES), 3)) if self._sums is None else self._sums.sum(0)
        rows = zip(SITES, sums, strict=True)
        return {site: (int(n), angle / n, drift / n) for site, (n, angle, drift) in rows if n}

    @property
    def noise(self) -> Noise:
        """The noise that the next drugged token gets."""
        seed = self.noise_seed % (1 << 64)
        return Noise(self.schedule, seed, self.born, self._protected_positions, self._protected_ids)

    def put_noise(self, noise: Noise) -> None:
        """Take the noise of another sequence: from now on both get the same."""
        self.protect(noise.protect, noise.protect_ids)
        self.dose(noise.schedule, noise.seed)
        self.born = noise.born

    def check(self, ids: Sequence[int]) -> None:
        """PromptError or ContextOverflow if these tokens cannot be fed now."""
        self._catch_up()
        if not isinstance(ids, (Sequence, np.ndarray)):
            raise PromptError(f"token ids must be a list, not {shown(ids)}")
        last = self.runtime.config.vocab_size - 1
        for token in ids:
            if not isinstance(token, Integral) or not 0 <= token <= last:
                raise PromptError(f"token id {shown(token)} is not between 0 and {last}")
        if self.pos + len(ids) > self.runtime.n_ctx:
            raise ContextOverflow(self.pos + len(ids), self.runtime.n_ctx)

    def coming(self, ids: Sequence[int], start: int) -> None:
        """Called by the runtime: these tokens are about to be written, from this position on."""
        if self._protected_ids:
            self._mark(ids, start)

    def parts(self, ids: Sequence[int], drugged: str, outputs: int) -> list[Part]:
        """These tokens as parts of at most a chunk each. drugged: none, last (only the last token), all."""
        sober = {"none": len(ids), "last": len(ids) - 1, "all": 0}[drugged]
        parts, chunk = [], self.runtime.chunk
        for first, last, noisy in ((0, sober, False), (sober, len(ids), True)):
            for at in range(first, last, chunk):
                end = min(at + chunk, last)
                asked = max(0, outputs - (len(ids) - end))
                parts.append(Part(self, ids[at:end], noisy, min(asked, end - at)))
        return parts

    def feed(self, ids: Sequence[int], drugged: str = "none", outputs: int = 1) -> np.ndarray:
        """Feed tokens -> logits (outputs, V) of the last `outputs` of them, float32, a copy. drugged: none,
        last (only the last token), all. PromptError, ContextOverflow, ConfigError."""
        self.check(ids)
        if not len(ids):
            raise PromptError("there are no tokens to feed")
        if drugged not in PROMPTS:
            raise ConfigError(f"drugged: {shown(drugged)} is not {' or '.join(PROMPTS)}", "drugged")
        outputs = whole(outputs, "outputs", 0, len(ids))
        rows = [self.runtime.step([part]) for part in self.parts(ids, drugged, outputs)]
        return rows[0] if len(rows) == 1 else np.concatenate(rows)

    def advance(self, ids: Sequence[int], drugged: bool) -> None:
        """Called by the runtime: these tokens are in the cache now."""
        start, first = self.pos, max(self.pos, self.schedule.sink)
        self.ids.extend(map(int, ids))
        self._written = max(self._written, self.pos)
        noisy = drugged and first < self.pos and self._dosed
        if not drugged:
            self.born = max(self.born, self.pos)  # later, if the rest of this prompt is drugged
        elif noisy:
            if self.spans and self.spans[-1][1] == first:
                first = self.spans.pop()[0]
            self.spans.append((first, self.pos))
            self._clean = first if self._clean is None else self._clean
        if self._clean is not None:
            note(self.history, Write(start, self.pos, self.noise if noisy else None))

    # --- write drunk, edit sober ----------------------------------------------------------------------
    @property
    def dirty(self) -> int:
        """Tokens in the cache that were written under noise."""
        return sum(last - first for first, last in self.spans)

    @property
    def clean(self) -> int:
        """How many rows of the cache, from the first on, are as if never drugged."""
        return self.pos if self._clean is None else self._clean

    def sober_up(self, interrupt: Callable[[], bool] = lambda: False, chunk: int | None = None) -> int:
        """Write the cache anew without noise, from the first row that noise touched on -> rows still to do.

        Rows read after drugged ones are written anew too, since they have seen them. Afterwards the cache
        equals, bit for bit, one that was never drugged. Between chunks of so many tokens, interrupt() may
        stop the work; what is done stays done."""
        chunk = self.runtime.chunk if chunk is None else whole(chunk, "chunk", 1)
        if self._clean is None:
            return 0
        if self._lost(
            self._clean
        ):  # the ring no longer holds what these rows must see: from the start, at once
            self._clean, interrupt = 0, lambda: False
        self._clean = self.cache.turn_back(self._clean)
        while self._clean is not None and not interrupt():
            self._rewrite(min(self._clean + min(chunk, self.runtime.chunk), self.pos))
        return self.pos - self.clean

    def _rewrite(self, last: int) -> None:
        """Write the rows from the first unclean one up to `last` anew, without noise."""
        first = self._clean
        self.runtime.step([Part(self, self.ids[first:last], False, 0, first)])
        note(self.history, Write(first, last))
        self._clean = last
        self._trim()

    def _trim(self) -> None:
        """Forget spans that were cleaned or cut off."""
        clean, pos = self.clean, self.pos
        left = [(max(first, clean), min(last, pos)) for first, last in self.spans]
        self.spans = [(first, last) for first, last in left if first < last]
        self.history = cut(self.history, pos)
        if clean >= pos:
            self._clean, self.history = None, []

    def _lost(self, pos: int) -> bool:
        """Whether a token at this position would look back at slots that later positions have taken."""
        window = self.runtime.config.sliding_window
        seen = 0 if window is None else max(0, pos - window + 1)
        return pos > 0 and seen < self._written - self.cache.slots

    def rewind(self, n: int) -> None:
        """Forget the last n tokens. ConfigError if there are fewer, or if the ring no longer holds what the
        tokens before them must see."""
        n = whole(n, f"cannot rewind {shown(n)} of {self.pos} tokens", 0, self.pos, "n")
        pos = self.pos - n
        if self._lost(pos):
            raise ConfigError(
                f"cannot rewind {n} tokens: {self.cache.slots} slots no longer hold what came before", "n"
            )
        del self.ids[pos:]
        self.born = min(self.born, pos)
        self._trim()
        self._catch_up()

    def _catch_up(self) -> None:
        """Let a recurrent state read again what it has lost: by a rewind, by other features, or in a step
        that was interrupted."""
        there = self.cache.turn_to(self.pos, self.history[0].first if self.history else self.pos)
        if there == self.pos:
            return
        ids, history, noise, moved = self.ids, self.history, self.noise, self.moved.copy()
        self._forget()
        self.ids = ids[:there]
        self.retrace(ids, history)
        self.put_noise(noise)
        self.moved[:] = moved

    def shift(self, keep: int) -> None:
        """Make room in a full context: keep the first `keep` tokens and the later half of the rest, and read
        them again.

        They are fed anew, without noise, at their new positions: the same state as a prompt of those
        tokens gives."""
        keep = whole(keep, "keep")
        if keep >= self.pos == self.runtime.n_ctx:
            raise ConfigError(f"a shift that keeps {keep} of {self.pos} tokens makes no room", "shift_keep")
        keep = min(keep, self.pos)
        age = self.pos - self.born
        kept = self.ids[:keep] + self.ids[keep + (self.pos - keep + 1) // 2 :]
        self._forget()
        if kept:
            self.feed(kept)
        self.born = self.pos - age  # ramps go on

    def reset(self) -> None:
        """An empty sequence; doses stay, counters start anew."""
        self._forget()
        self.moved[:] = 0

    def _forget(self) -> None:
        self.ids, self.spans, self._clean, self.history, self._written = [], [], None, [], 0
        self.born = 0

    # --- the same state elsewhere -----------------------------------------------------------------------
    def fork(self) -> "Session":
        """A second continuation of this prefix, which shares nothing that can be written. Of the cache only
        what is in use is copied."""
        cache = self.runtime.new_cache()
        cache.copy_from(self.cache, self.blocks())
        return copy.deepcopy(self, {id(self.runtime): self.runtime, id(self.cache): cache})

    def blocks(self) -> np.ndarray:
        """The blocks of the cache that hold positions of this sequence."""
        return self.cache.blocks(max(0, self._written - self.cache.slots), self.pos)

    def adopt(self, other: "Session", rows: int) -> None:
        """Take over the cache of a sequence that is no longer needed, with its first rows, which are clean.
        ConfigError if its ring no longer holds what they must see."""
        other.rewind(other.pos - rows)
        self.cache, self.ids, self._written = other.cache, other.ids, other._written if rows else 0

    def retrace(self, ids: Sequence[int], history: Sequence[Write]) -> None:
        """Read tokens into an empty sequence as another one did whose history this is: every bit is what it
        was there. Leaves that noise behind. ConfigError if a smaller ring than there cannot do it."""
        sober = history[0].first if history else len(ids)
        if sober > self.pos:
            self.feed(ids[self.pos : sober], outputs=0)
        for write in history:
            if write.first < self.pos:
                if self._lost(write.first):
                    raise ConfigError(
                        f"{self.cache.slots} slots are too few for this history: load with a larger chunk",
                        "chunk",
                    )
                self._clean = write.first
                while self.clean < write.last:
                    self._rewrite(min(self._clean + self.runtime.chunk, write.last))
                continue
            if write.noise:
                self.put_noise(write.noise)
            self.feed(ids[write.first : write.last], "all" if write.noise else "none", outputs=0)

    def save(self, path: str | os.PathLike) -> None:
        """Write the sequence to a safetensors file, whole or not at all; `load` reads it. ConfigError naming
        the path."""
        snapshot.save(self, path)

    @classmethod
    def load(cls, runtime: Runtime, path: str | os.PathLike) -> "Session":
        """A saved sequence, which continues as the original would. BadModelFile if the file is damaged,
        ConfigError naming what differs if it is another model's."""
        session = cls(runtime)
        snapshot.load(session, path)
        return session
