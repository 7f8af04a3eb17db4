"""A loaded model that runs: its program with memory behind it, and one forward pass over tokens of many
sequences."""

import json
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from types import ModuleType

import numpy as np

from tinydrug.engine.cache import RingCache, slots_needed
from tinydrug.engine.doses import dose_table, term_table
from tinydrug.engine.pace import Pace
from tinydrug.engine.state import RecurrentState
from tinydrug.errors import ConfigError
from tinydrug.formats.config import Config
from tinydrug.formats.weights import Weights, padded
from tinydrug.kernels import attention, linear_tiles
from tinydrug.kernels.attention import CHUNK, partial_bytes, split_tiles
from tinydrug.kernels.crew import compile_all
from tinydrug.kernels.memory import Loans, aligned
from tinydrug.kernels.tables import CALL, OPERAND, SPAN, TOKEN
from tinydrug.kernels.team import Team, post, serve
from tinydrug.models.features import Features
from tinydrug.models.program import Program, Value
from tinydrug.models.srf import FeatureProgram
from tinydrug.noise import SITES, SOBER

REWIND_EVERY = (
    420  # drugged tokens after which the cache is written anew without noise, as in DRµGS; 0: never
)
TILE = 16  # rows a linear tile may reach past the last token


@dataclass(frozen=True)
class Part:
    """Consecutive tokens of one session in a step: all drugged or all sober; `outputs` asks for logits of the
    last so many of them. `start`: they are in the cache already, from this position on, and are written anew;
    None: they are new."""

    session: "object"
    ids: Sequence[int]
    drugged: bool
    outputs: int
    start: int | None = None


class Runtime:
    """The weights, the program and the threads of one model. One step at a time: `step` holds a lock."""

    def __init__(
        self,
        config: Config,
        weights: Weights,
        architecture: ModuleType,
        *,
        threads: int,
        n_ctx: int,
        cell: str = "f16",
        features: Features | None = None,
        chunk: int = 512,
        rewind_every: int = REWIND_EVERY,
        progress: Callable[[float], None] | None = None,
        tokenizer: Callable[[], str] = lambda: "",  # gives its fingerprint
        probe: bool = False,  # keep hidden states: `hidden` has another runtime for it
    ):
        self._tokenizer, self._architecture = tokenizer, architecture
        self.config, self.weights, self.n_ctx, self.cell, self.chunk = config, weights, n_ctx, cell, chunk
        self.rewind_every = rewind_every
        self.slots = slots_needed(n_ctx, config.sliding_window, chunk, rewind_every)
        self._lock = threading.Lock()
        self.features = features  # of srf attention; None: attention is softmax
        self._program = (
            FeatureProgram(config, weights, cell, features) if features else Program(config, weights, cell)
        )
        self._program.hidden = [] if probe else None
        self._outputs = architecture.forward(self._program, config, n_ctx)
        self.sober = dose_table(SOBER, config.n_layers, cell)
        self.sober_terms = term_table(SOBER, config)
        compile_all([*self._program.kernels(), serve, post], threads, progress)
        self._call = CALL.rows()
        self._tokens = TOKEN.rows(chunk)
        self._call["tokens"] = self._tokens.ctypes.data
        self._call["sites"] = len(SITES)
        self._team = Team(self._call, threads)
        self._pace = Pace(threads)
        weakref.finalize(self, self._team.dismiss)  # may run anywhere: it must not wait
        d = padded(config.head_dim)
        widest = padded(max(config.hidden_size, config.intermediate_size, config.n_heads * d))
        room = padded(
            max(attention.scratch_bytes(d), linear_tiles.scratch_bytes(widest), 2048 + 4 * widest), 4096
        )
        self._scratch = aligned((threads, room), np.uint8)
        self._call["scratch"], self._call["scratch_stride"] = (
            self._scratch.ctypes.data,
            self._scratch.strides[0],
        )
        self._logits, self._logits_address = Loans(), 0
        self._reserve_values()
        self._reserve_spans(1)

    @property
    def threads(self) -> int:
        return self._team.threads

    @cached_property
    def identity(self) -> dict:
        """All that the bits of a sequence depend on besides its tokens and its noise, JSON-safe: for records
        and saved sessions. The first call hashes every weight."""
        return {
            "config": json.loads(json.dumps(asdict(self.config))),  # as it comes back from a file
            "quant": self.weights.quant,
            "cache": self.cell,
            "features": self.features and asdict(self.features),
            "n_ctx": self.n_ctx,
            "tokenizer": self._tokenizer(),
            "weights": self.weights.fingerprint(),
        }

    @property
    def bytes_per_token(self) -> int:
        """Bytes of weights that decoding one token reads: every matrix once, of the embedding one row."""
        used = {step.weight.row for step in self._program.steps if step.weight and step.operands.get("x")}
        return sum(self.weights.nbytes_of(row) for row in used)

    def new_cache(self) -> RingCache | RecurrentState:
        """The memory of an empty sequence."""
        if self.features is None:
            return RingCache(self.config, self.slots, self.cell)
        return RecurrentState(self._program, self.slots)

    def redraw(self, seed: int) -> None:
        """Draw the random features of srf attention anew. Sessions read their tokens again when next used.
        ConfigError if there are none."""
        if self.features is None:
            raise ConfigError(
                'attention: softmax has no features to redraw: load with attention="srf"', "attention"
            )
        with self._lock:
            self.features = replace(self.features, seed=seed)
            for runtime in self._both():
                runtime._program.draw(self.features)
            vars(self).pop("identity", None)

    def step(self, parts: Sequence[Part]) -> np.ndarray:
        """Feed the parts, at most `chunk` tokens together -> logits (outputs, V) of the tokens asked for, in
        order: the caller's own.

        Sessions are advanced."""
        with self._lock:
            return self._step(parts)

    def hidden(self, parts: Sequence[Part]) -> tuple[np.ndarray, np.ndarray]:
        """As `step` -> logits (outputs, V), and of the same tokens the residual stream after every layer,
        (L, outputs, D) float32. What `step` costs does not grow by it."""
        with self._lock:
            logits = self._probed._step(parts)
            n, D = len(logits), self.config.hidden_size
            return logits, np.stack([area[:n, :D] for area in self._probed._hidden])

    @cached_property
    def _probed(self) -> "Runtime":
        """This model with a program that keeps hidden states; sequences belong to both."""
        return Runtime(
            self.config,
            self.weights,
            self._architecture,
            threads=self.threads,
            n_ctx=self.n_ctx,
            cell=self.cell,
            features=self.features,
            chunk=self.chunk,
            rewind_every=self.rewind_every,
            probe=True,
        )

    def _both(self) -> list["Runtime"]:
        """This one, and the one that keeps hidden states if there is any."""
        return [self, *filter(None, [vars(self).get("_probed")])]

    def close(self) -> None:
        """Let the threads go; the next step would start them again."""
        with self._lock:
            for runtime in self._both():
                runtime._team.close()

    def profile(self, on: bool) -> None:
        """Start (from zero) or stop counting the cycles of every operation."""
        self._call["profile"] = int(on)
        if on:
            self._ops["cycles"] = 0

    def cycles(self) -> dict[str, int]:
        """Cycles thread 0 spent, by kernel, barriers before it included."""
        total: dict[str, int] = {}
        for step, cycles in zip(self._program.steps, self._ops["cycles"], strict=True):
            total[step.kernel.name] = total.get(step.kernel.name, 0) + int(cycles)
        return total

    def _step(self, parts):
        n_outputs = sum(part.outputs for part in parts)
        logits = self._lend_logits(n_outputs)
        self._reserve_spans(len(parts))
        spans, owners, positions, ids, outputs = [], [], [], [], []  # a span a part; the others a token
        out, ahead = 0, {}  # logits asked for, and tokens this step already gives a session
        for s, part in enumerate(parts):
            session, n = part.session, len(part.ids)
            start = part.start
            if start is None:
                start = session.pos + ahead.get(id(session), 0)
                ahead[id(session)] = ahead.get(id(session), 0) + n
            session.coming(part.ids, start)
            self._program.reach(start + n)
            doses = session.doses if part.drugged else self.sober
            terms = session.terms if part.drugged else self.sober_terms
            noisy = part.drugged and not session.schedule.is_sober
            keys, values = session.cache.begin(start, noisy, part.start is not None)
            noise = doses.ctypes.data, session.noise_seed, session.born, session.awake.ctypes.data
            counts = session.moved.ctypes.data, session.measured
            spans.append((len(ids), n, keys, values, self.slots, *noise, *counts, terms.ctypes.data))
            owners.extend([s] * n)
            positions.extend(range(start, start + n))
            ids.extend(part.ids)
            outputs.extend([-1] * (n - part.outputs))
            outputs.extend(range(out, out := out + part.outputs))
        t = len(ids)
        self._spans[: len(spans)] = spans
        for name, column in (("span", owners), ("position", positions), ("id", ids), ("output", outputs)):
            self._tokens[name][:t] = column
        call = self._call
        call["n_tokens"], call["n_outputs"], call["n_spans"] = t, n_outputs, len(parts)
        # What sober tokens leave behind, if no logits are asked for, is in the cache before the end.
        cached_only = n_outputs == 0 and not any(part.drugged for part in parts)
        call["n_ops"] = self._program.cached if cached_only else len(self._ops)
        if t > 1:  # arithmetic-bound: all threads, always
            self._team.run(self.threads)
        else:
            start = time.perf_counter()
            self._team.run(self._pace.choose())
            self._pace.note(time.perf_counter() - start)
        for part in parts:
            session, again = part.session, part.start is not None
            if not again:
                session.advance(part.ids, part.drugged)
            end = part.start + len(part.ids) if again else session.pos
            session.cache.end(end, again, end == session.pos)
        return logits

    def _reserve_spans(self, count):
        """Room for the tables of so many spans and the partial results of their attention."""
        if getattr(self, "_span_room", 0) >= count:
            return
        self._span_room = count
        c = self.config
        tiles = count * c.n_kv_heads * split_tiles(c.n_heads // c.n_kv_heads)
        chunks = self.n_ctx // CHUNK + 2
        self._parts = aligned(tiles * chunks * partial_bytes(padded(c.head_dim)), np.uint8, huge=False)
        self._part_counts = aligned(tiles, np.int64)
        self._spans = SPAN.rows(count)
        self._call["spans"] = self._spans.ctypes.data
        self._call["parts"], self._call["part_counts"] = (
            self._parts.ctypes.data,
            self._part_counts.ctypes.data,
        )

    def _lend_logits(self, count):
        """Logits (count, V) that the next step will write: memory that no caller holds any more."""
        shape = count, self.config.vocab_size
        rows = count + TILE if count > 1 else 1
        logits, address = self._logits.take(rows, shape, self._outputs.nbytes)
        if address != self._logits_address:
            self._logits_address = address
            for operand in self._logits_at:
                operand["data"] = address
        return logits

    def _reserve_values(self):
        """Memory for every value of the program but the logits."""
        program, threads = self._program, self.threads
        place, rows = program.place(), self.chunk + TILE
        areas = {}
        for slot, area in enumerate(place):
            if slot != self._outputs.slot and area not in areas:
                areas[area] = aligned((rows + threads, program.row_bytes[slot]), np.uint8)
        self._areas, self._operands, self._logits_at = areas, [], []

        def operand(value: Value) -> int:
            row = OPERAND.rows()
            row["stride"] = value.nbytes
            if value.slot < 0:
                row["data"] = program.tables[-2 - value.slot].ctypes.data
            elif value.slot == self._outputs.slot:
                self._logits_at.append(row)
            else:
                area = areas[place[value.slot]]
                row["data"] = area.ctypes.data
                row["private"] = area[-threads:].ctypes.data if value.private else 0
            self._operands.append(row)
            return row.ctypes.data

        self._ops = program.table(operand, self.weights.table)
        self._call["ops"] = self._ops.ctypes.data
        self._hidden = [areas[place[v.slot]].view(np.float32) for v in program.hidden or ()]
