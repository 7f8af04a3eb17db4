"""The tables a forward pass is made of: one row a weight tensor, an operation, a token, a span of tokens, a
dose.

Sizes in comments: T tokens of this call, D hidden size, H query heads, G key/value heads, d head width, S
cache slots. Every width is padded to a multiple of 32 with zeros when weights are loaded, so no kernel has
a tail.
"""

from tinydrug.kernels.jit import inline, kernel
from tinydrug.kernels.kinds import int64, void
from tinydrug.kernels.structs import Struct

PAD = 32  # columns of a quantisation block, and what every width is padded to
PANEL = 16  # output rows that lie together: one a lane

WEIGHT = Struct(
    "Weight",
    n="i8",  # output rows, padded to whole panels
    k="i8",  # input columns, padded to whole blocks
    data="i8",  # address of the panels
    scales="i8",  # address of the block scales, 0 for float formats
    bias="i8",  # address of n floats, 0 for none
    gather="i8",  # address of the function that writes one row of the matrix as floats
)

DOSE = Struct(  # one a (layer, site)
    "Dose",
    theta="f8",  # radians; 0: sober, and the rest of the row means nothing
    form="i8",
    angle="i8",
    layer="i8",  # the layer its draws are keyed by: its own, or one for all layers that share a direction
    renewal="i8",  # fresh at every step, held, or wandering
    tokens="f8",  # of which a wandering direction forgets itself
    ramp="i8",  # how theta changes over generated tokens
    over="f8",  # tokens the ramp takes
    rotate="i8",  # addresses of the law's three kernels (noise.py)
    keys="i8",
    values="i8",
)

TERM = Struct("Term", drift="f8", diffusion="f8", learned="f8")  # one a layer: amounts of drift.py

SPAN = Struct(  # consecutive tokens of one sequence that share a schedule
    "Span",
    first="i8",  # its tokens are rows first .. first + count of the token table
    count="i8",
    keys="i8",  # address of the sequence's key cache, (L, G, S/16, d, 16)
    values="i8",  # and of its value cache, (L, G, S, d)
    slots="i8",  # S: position p lies in slot p mod S
    doses=DOSE,  # (L, sites)
    seed="i8",
    born="i8",  # position of the first generated token: ramps count from it
    awake="i8",  # address of an int32 a position: how many positions before it noise may touch
    moved="i8",  # address of one counter a site, then of drift and diffusion: vectors that were moved
    measured="i8",  # address of (vectors, angles, logs of norm ratios) a thread and site; 0: do not measure
    terms=TERM,  # (L,)
)

TOKEN = Struct("Token", span="i8", position="i8", id="i8", output="i8")  # output: row of the logits, or -1

OPERAND = Struct(  # an array with one row a token
    "Operand",
    data="i8",
    stride="i8",  # bytes from row to row
    private="i8",  # address of one row a thread, used when the call has one row; 0: the shared row is used
)

OP = Struct(  # one operation of the forward pass
    "Op",
    kernel="i8",
    barrier_alone="i8",  # whether all threads must meet before it: when the call has one row,
    barrier_many="i8",  # and when it has more
    on_outputs="i8",  # 1: its rows are the tokens whose logits are asked for; 0: all tokens
    layer="i8",
    site="i8",  # column of the dose table; attention draws keys' noise there,
    value_site="i8",  # and values' noise here
    x=OPERAND,
    y=OPERAND,
    z=OPERAND,
    w=OPERAND,
    weight=WEIGHT,
    features="i8",  # address of the layer's random directions (srf.py)
    onto="i8",  # 1: a linear map adds to what y holds
    heads="i8",
    kv_heads="i8",
    head_dim="i8",  # floats from head to head (padded)
    width="i8",  # length of a vector: true for means, padded for what runs over all of it
    period="i8",  # of every `period` components of a vector
    valid="i8",  # the first `valid` exist, the rest is padding
    window="i8",  # attention reaches back this many positions
    cell="i8",  # bytes of one element of the cache
    scale="f8",
    eps="f8",
    cycles="i8",  # spent by thread 0, when profiling
)

CALL = Struct(
    "Call",
    n_tokens="i8",
    n_outputs="i8",
    n_spans="i8",
    n_ops="i8",
    tokens=TOKEN,
    spans=SPAN,
    ops=OP,
    sites="i8",  # columns of a dose table
    sync="i8",  # address of the team's atomic words
    scratch="i8",  # address of the threads' private memory
    scratch_stride="i8",
    parts="i8",  # address of the partial results of attention
    part_counts="i8",  # address of the counters of finished partial results
    profile="i8",
)

OPERATION = void(CALL, OP, int64, int64)  # kernel(call, op, thread, threads)
operation = kernel(OPERATION)
GATHER = void(WEIGHT, int64, int64)  # gather(weight, row, out address)


@inline
def rows_of(call, op):
    """How many rows this operation has in this call."""
    return call.n_outputs if op.on_outputs else call.n_tokens


@inline
def share(units, tid, n):
    """The units lo .. hi of this thread."""
    return units * tid // n, units * (tid + 1) // n


@inline
def share_rows(rows, tid, n):
    """The rows lo .. hi of this thread: neighbours, and whole sixteens if there are enough, since those may
    lie together (quantise.py). Threads that write to the same cache line wait for each other."""
    if rows < 16 * n:
        return share(rows, tid, n)
    lo, hi = share((rows + 15) // 16, tid, n)
    return 16 * lo, min(16 * hi, rows)


@inline
def my_rows(call, op, tid, n):
    """lo, hi, me: the rows of this thread. With one row every thread computes it for itself, in its own
    memory: that costs less than waiting for each other. `me` is then the thread, else -1."""
    rows = rows_of(call, op)
    if rows == 1:
        return 0, 1, tid
    lo, hi = share_rows(rows, tid, n)
    return lo, hi, -1


@inline
def row(operand, i, me):
    """The address of row i, as thread `me` of a call with one row (or -1) sees it."""
    if me >= 0 and operand.private != 0:
        return operand.private + me * operand.stride
    return operand.data + i * operand.stride


@inline
def to_next(operand, i, hi):
    """Bytes from row i to the next, for who asks for memory ahead; from the last, row hi - 1, none."""
    return operand.stride if i + 1 < hi else 0


@inline
def reader(call, op, tid):
    """As `my_rows`, for an operation that splits something other than rows: only `me`."""
    return tid if rows_of(call, op) == 1 else -1
