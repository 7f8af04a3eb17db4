"""The program of a model: its barriers and shared memory, against a model of who touches what."""

import itertools

import pytest
from engines import runtime

from tinydrug.models.program import CACHE, HEADS, ROWS, SHARED, TOKENS

MODELS = ["llama-gqa", "llama-head12", "llama-bias", "mistral-window", "gpt2"]
QUANTS = ["none", "q8", "q4"]


@pytest.fixture(scope="module")
def program(tiny_model):
    built = {}

    def make(name, quant="none"):
        if (name, quant) not in built:
            built[name, quant] = runtime(tiny_model(name), quant=quant, threads=1)
        return built[name, quant]._program

    yield make
    for each in built.values():
        each.close()


# --- who touches what: written from what each kernel says it does, not from how the program calls its split

OWN_ROWS = ("rms_norm", "layer_norm", "silu_mul", "gelu_tanh", "gelu_erf", "noise_rows", "drift")
OWN_ROWS += ("quantise_32", "quantise_128", "quantise_256_spread")
OWN_TOKENS = ("embed", "add_position")
OWN_HEADS = ("rope", "noise_heads", "write_cache")


def touched(step, place, thread: int, threads: int, tokens: int, outputs: int, kv_heads: int):
    """{(memory, row, part of it): whether it is written} by this thread. Parts: kv heads, or columns of a
    linear map; None is all of them. A private row is memory of its own."""
    name = step.kernel.name
    on_outputs = "y" in step.operands and step.operands["y"].on_outputs
    rows, found = outputs if on_outputs else tokens, {}

    def touch(operand, row, part, written):
        value = step.operands[operand]
        if value.slot < 0:
            return  # a table of constants
        area = place[value.slot]
        if name in (*OWN_ROWS, "linear") and rows == 1 and value.private:
            area, row = (area, "of thread", thread), 0
        key = area, row, part
        found[key] = found.get(key, False) or written

    arrays = [operand for operand in ("x", "z") if operand in step.operands]
    name = "linear" if name.startswith("linear") else "attend" if name.startswith("attend") else name
    if name in OWN_ROWS or name in OWN_TOKENS:
        alone = rows == 1 and name in OWN_ROWS
        for row in range(rows) if alone else range(thread, rows, threads):
            for operand in arrays:
                touch(operand, row, None, False)
            touch("y", row, None, True)
    elif name in OWN_HEADS:
        for unit in range(thread, tokens * kv_heads, threads):
            row, head = divmod(unit, kv_heads)
            if name == "write_cache":
                touch("x", row, head, False)
                touch("z", row, head, False)
                found[CACHE, row, head] = True
            else:
                touch("y", row, head, True)
    elif name == "linear":
        for row in range(rows):
            touch("x", row, None, False)
            touch("y", row, ("columns of", thread), True)
    elif name == "asked":
        if outputs:
            for row in range(thread, tokens, threads):
                touch("x", row, None, False)
                if row >= tokens - outputs:
                    touch("y", row - (tokens - outputs), None, True)
    elif name == "attend":  # units go to whoever asks first: any thread may touch anything
        for row, head in itertools.product(range(tokens), range(kv_heads)):
            touch("x", row, head, False)
            found[CACHE, row, head] = False
            touch("y", row, (head, "by", thread), True)
    else:
        raise AssertionError(f"say what {name} touches")
    return found


def overlap(one, other) -> bool:
    """Whether two parts of a row have memory in common; columns of a map and heads are not told apart."""
    if one is None or other is None:
        return True
    if isinstance(one, tuple) and isinstance(other, tuple) and one[0] == other[0] == "columns of":
        return one == other
    heads = [part[0] if isinstance(part, tuple) else part for part in (one, other)]
    return "columns of" in heads or heads[0] == heads[1]


def hazards(program, threads: int, tokens: int, outputs: int, skipped: int | None = None) -> list[str]:
    """Pairs of steps between whose threads something would be read or written too early."""
    place, found, since = program.place(), [], [dict() for _ in range(threads)]
    flags = {True: program.barriers(place, True), False: program.barriers(place, False)}
    for i, step in enumerate(program.steps):
        on_outputs = "y" in step.operands and step.operands["y"].on_outputs
        alone = (outputs if on_outputs else tokens) == 1
        if flags[alone][i] and i != skipped:
            since = [dict() for _ in range(threads)]
        now = [
            touched(step, place, t, threads, tokens, outputs, program.config.n_kv_heads)
            for t in range(threads)
        ]
        for here, there in itertools.permutations(range(threads), 2):
            for (area, row, part), written in now[here].items():
                for (other_part, other_written), before in since[there].get((area, row), {}).items():
                    if (written or other_written) and overlap(part, other_part):
                        found.append(f"step {i} {step.kernel.name} after {before}")
        for t in range(threads):
            for (area, row, part), written in now[t].items():
                since[t].setdefault((area, row), {})[part, written] = f"{i} {step.kernel.name}"
    return found


CALLS = [(1, 1), (1, 0), (2, 1), (2, 2), (5, 1), (5, 5), (5, 0), (3, 2)]  # tokens, outputs


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("name", MODELS)
def test_barriers_are_enough(name, quant, program):
    for threads in (2, 3):
        for tokens, outputs in CALLS:
            assert not hazards(program(name, quant), threads, tokens, outputs), (threads, tokens, outputs)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2"])
def test_no_barrier_is_there_for_nothing(name, program):
    """Each keeps some pair of steps apart in one kind of call at least: so the model above has teeth."""
    subject = program(name, "q8")
    for alone in (True, False):
        calls = [(1, 1)] if alone else [(5, 5), (5, 3)]
        for i, flag in enumerate(subject.barriers(subject.place(), alone)):
            if flag:
                assert any(hazards(subject, 3, *call, skipped=i) for call in calls), subject.steps[
                    i
                ].kernel.name


def test_how_often_threads_meet(program):
    """A barrier costs up to a microsecond: their number a layer is a promise of speed."""
    for name, layers, alone, many in (("llama-gqa", 3, 8, 12), ("gpt2", 2, 8, 12)):
        subject = program(name, "q8")
        place = subject.place()
        assert sum(subject.barriers(place, True)) <= alone * layers + 2
        assert sum(subject.barriers(place, False)) <= many * layers + 2


# --- memory


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("name", MODELS)
def test_values_that_share_memory_are_never_alive_together(name, quant, program):
    """Every read finds what its own value wrote last; areas hold values of one size."""
    subject = program(name, quant)
    place, holds, sizes = subject.place(), {}, {}
    for i, step in enumerate(subject.steps):
        in_place = step.fields.get("onto") == 1
        for slot, _ in step.reads:
            if slot != CACHE:
                assert holds.get(place[slot]) == slot, f"step {i} {step.kernel.name} reads what is gone"
        for slot, _ in step.writes:
            if slot != CACHE:
                if in_place:
                    assert holds.get(place[slot]) == slot, f"step {i} adds to what is gone"
                holds[place[slot]] = slot
                assert sizes.setdefault(place[slot], subject.row_bytes[slot]) == subject.row_bytes[slot]
    assert holds[place[step.operands["y"].slot]] == step.operands["y"].slot, "the logits are there at the end"
    assert max(place) + 1 < len(place) / 2, "memory is reused"


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("name", MODELS)
def test_no_operation_reads_beyond_a_row(name, quant, program):
    """What a map reads is as wide as what was written, padding included."""
    for step in program(name, quant).steps:
        if step.kernel.name.startswith("linear"):
            x, y = step.operands["x"], step.operands["y"]
            assert x.width >= step.weight.k and y.width >= step.weight.n
            if "q" in step.kernel.name:  # a quantised row has its scales behind its columns
                assert x.width == step.weight.k
        for value in step.operands.values():
            if value.slot >= 0 and not step.kernel.name.startswith(("linear_q", "linear_iq", "quantise")):
                assert 4 * value.width <= value.nbytes


def test_a_row_is_quantised_once_for_all_maps_that_read_it(program):
    steps = [step.kernel.name for step in program("llama-gqa", "q8").steps]
    assert steps.count("quantise_256_spread") == 4 * 3 + 1  # before q/k/v, o, gate/up, down, and the head


def test_splits_are_known(program):
    for name in MODELS:
        assert {step.split for step in program(name).steps} <= {ROWS, TOKENS, HEADS, SHARED}
