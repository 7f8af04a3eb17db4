"""Instructions by which threads meet, functions are called by address, and time is told."""

import platform
import sys

from llvmlite import ir

from tinydrug.kernels import emit
from tinydrug.kernels.emit import i32, i64
from tinydrug.kernels.isa import ISA
from tinydrug.kernels.kinds import Op, Signature, address, op, void


def call_at(sig: Signature) -> Op:
    """The instruction (address, *args of sig): call the C function of this signature that lies at an
    address."""
    kind = ir.FunctionType(sig.result.llvm, [arg.llvm for arg in sig.args])

    @op(sig.result(address, *sig.args))
    def call(b, target, *args):
        return b.call(b.inttoptr(target, kind.as_pointer()), args)

    return call


@op(address(address, address))
def atomic_add(b, p, x):
    return b.atomic_rmw("add", b.inttoptr(p, i64.as_pointer()), x, "seq_cst")


@op(address(address, address))
def atomic_swap(b, p, x):
    return b.atomic_rmw("xchg", b.inttoptr(p, i64.as_pointer()), x, "seq_cst")


@op(address(address))
def atomic_load(b, p):
    return b.load_atomic(b.inttoptr(p, i64.as_pointer()), "seq_cst", 8)


@op(void(address, address))
def atomic_store(b, p, x):
    b.store_atomic(x, b.inttoptr(p, i64.as_pointer()), "seq_cst", 8)


@op(void())
def pause(b):
    """Tell the core that this is a waiting loop (nothing on machines without such an instruction)."""
    if ISA != "portable":
        emit.call(b, "llvm.x86.sse2.pause", ir.VoidType(), [])


# The number of Linux's system call futex, which differs by machine.
_FUTEX = {"x86_64": 202, "aarch64": 98}.get(platform.machine()) if sys.platform == "linux" else None
_WAIT, _WAKE = 128, 129  # FUTEX_WAIT and FUTEX_WAKE among the threads of a process


def _futex(b, p, action, number):
    """futex(2), through the C library's `syscall`, since it has no function of that name."""
    emit.call(b, "syscall", i64, [i64(_FUTEX), p, i64(action), b.zext(number, i64), i64(0)])


@op(void(address, address))
def sleep_while(b, p, x):
    """Give the core away while the lower half of the word at p is that of x, until somebody wakes those who
    sleep there; it may also return for no reason. Not Linux: for a turn of whoever wants the core."""
    if _FUTEX:
        _futex(b, p, _WAIT, b.trunc(x, i32))
    else:
        emit.call(b, "sched_yield", i32, [])


@op(void(address))
def wake(b, p):
    """Wake all threads that sleep at p."""
    if _FUTEX:
        _futex(b, p, _WAKE, i32(2**31 - 1))


@op(address())
def cycles(b):
    return emit.call(b, "llvm.readcyclecounter", i64, [])
