"""The command: which part of it the first word chooses, and the exit status, whatever happens.

0; 1 a failure at run time; 2 bad input; 130 Ctrl-C, 141 a closed pipe, 143 SIGTERM. Only -v shows tracebacks.
"""

import difflib
import importlib
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tinydrug.errors import ConfigError, TinydrugError


def main(argv: list[str] | None = None) -> int:
    """Run the command with these words (None: those of the command line) and return its exit status."""
    words = sys.argv[1:] if argv is None else list(argv)
    _open_streams()
    try:
        with _terminable():
            return _command(words)
    except KeyboardInterrupt:
        if sys.stderr.isatty():  # which shows ^C
            print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # nobody reads any more: leave quietly
        _discard(sys.stdout)
        return 141
    except Exception as error:
        if {"-v", "--verbose"} & set(words):
            import traceback

            traceback.print_exc()
        status, message = _explained(error)
        print("error:", " ".join(message.splitlines()), file=sys.stderr)
        return status


def _command(words: list[str]) -> int:
    try:
        status = _chosen(words)
    except SystemExit as leaving:  # --help, or SIGTERM
        status = leaving.code or 0
    sys.stdout.flush()
    return status


def _chosen(words: list[str]) -> int:
    """The command that the first word names; without one, generation."""
    if words and not words[0].startswith("-"):
        if words[0] not in COMMANDS:
            near = difflib.get_close_matches(words[0], COMMANDS, n=1) or COMMANDS
            raise ConfigError(
                f"there is no command {words[0]!r}, only {', '.join(near)}; a prompt goes after -p, in quotes"
            )
        return importlib.import_module(COMMANDS[words[0]]).run(words[1:])
    from tinydrug.cli.options import parse

    args = parse(words)  # before anything slow is imported
    from tinydrug.cli.run import run

    return run(args)


def _explained(error: Exception) -> tuple[int, str]:
    """Exit status and message of an error."""
    match error:
        case TinydrugError():
            return error.exit_status, str(error)
        case MemoryError():
            return 1, "not enough memory: try --quant q4, a smaller --ctx-size or a smaller model"
        case OSError(filename=str(name)):
            if name == "standard output":
                _discard(sys.stdout)
            return 1, f"{name}: {error.strerror}"
    return 1, f"internal error: {type(error).__name__}: {error} (run it with -v and report what it prints)"


def _open_streams() -> None:
    """Standard streams there are, which take any character."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the caller, as `>&-` does
            setattr(sys, name, open(os.devnull, mode))
    with suppress(AttributeError):  # someone's own stream
        sys.stdout.reconfigure(errors="replace")


def _discard(stream) -> None:
    """What could not be written is not tried again at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM unwinds the stack, so that nothing half done stays behind; unless someone else handles it."""
    ours = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

    def leave(signum, frame):
        raise SystemExit(128 + signum)

    if ours:
        signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


COMMANDS = {  # word: the module whose run(words after it) returns the exit status
    "lab": "tinydrug.cli.lab",
    "bench": "tinydrug.cli.bench",
    "models": "tinydrug.cli.models",
    "quantize": "tinydrug.cli.quantize",
    "replay": "tinydrug.cli.replay",
}
