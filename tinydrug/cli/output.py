"""Where the text goes, standard output or a file, and in which form, plain or as lines of JSON."""

import json
import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress

from tinydrug import __version__
from tinydrug.errors import ConfigError

Write = Callable[[str], None]
STDOUT = "standard output"


def destination(path: str | None, flag: str = "--output-file"):
    """A context whose value is a function Write: to standard output, or to the file at `path`."""
    return nullcontext(to_stdout) if path in (None, "-") else WholeFile(path, flag)


def recorder(path: str | None):
    """A context whose value is a function Write for a record, or None if none is wanted."""
    return nullcontext() if path is None else WholeFile(path, "--record")


class WholeFile:
    """A text file that appears when its `with` block ends well, and then as a whole; the value is its Write.

    A device or a pipe is written directly. ConfigError naming `flag` if it cannot be opened, OSError naming
    the file if writing fails later.
    """

    def __init__(self, path: str, flag: str):
        self._path, self._target = path, os.path.realpath(path)
        self._replaces = os.path.isfile(self._target) or not os.path.exists(self._target)
        self._partial = f"{self._target}.{os.getpid()}.partial" if self._replaces else self._target
        try:
            self._file = open(self._partial, "w", encoding="utf-8", newline="")
        except OSError as error:
            raise ConfigError(f"{flag}: {path}: {error.strerror}", "output_file") from None

    def __enter__(self) -> Write:
        return self._write

    def __exit__(self, kind, *_) -> None:
        try:
            with self._named():
                self._file.close()
                if self._replaces and kind is None:
                    with suppress(FileNotFoundError):  # a new file has no mode to keep
                        os.chmod(self._partial, stat.S_IMODE(os.stat(self._target).st_mode))
                    os.replace(self._partial, self._target)
        finally:
            if self._replaces:
                with suppress(FileNotFoundError):  # it is in its place
                    os.unlink(self._partial)

    def _write(self, text: str) -> None:
        with self._named():
            self._file.write(text)

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._path) from None


def to_stdout(text: str) -> None:
    """Write and flush. BrokenPipeError if nobody reads any more, other OSErrors with STDOUT as their file."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, STDOUT) from None


class PlainText:
    """The text as it comes, and a newline at the end if it has none."""

    def __init__(self, write: Write):
        self._write, self._last = write, ""

    def text(self, text: str) -> None:
        if text:
            self._write(text)
            self._last = text[-1]

    def step(self, step) -> None:
        self.text(step.text)

    def end(self, completion=None) -> None:
        if self._last not in ("", "\n"):
            self.text("\n")


class JsonLines:
    """A line {"type": "token"} for each token, and {"type": "completion"} with everything at the end."""

    def __init__(self, write: Write, talk, prompt: str):
        self._write, self._talk, self._prompt = write, talk, prompt

    def step(self, step) -> None:
        record = {"type": "token", "index": step.index, "id": step.id, "text": step.text}
        if step.logprob is not None:
            piece = self._talk.engine.tokenizer.token_text
            record["logprob"] = step.logprob
            record["top"] = [{"id": i, "text": piece(i), "logprob": logprob} for i, logprob in step.top]
        self._line(record)

    def end(self, completion) -> None:
        self._line({
            "type": "completion",
            "text": completion.text,
            "finish_reason": completion.finish_reason,
            "ids": completion.ids,
            "prompt": self._prompt,
            "prompt_ids": completion.prompt_ids,
            "model": self._talk.engine.name,
            "source": self._talk.engine.source,
            "seed": completion.seed,
            "drug": str(completion.schedule),
            "drug_seed": completion.drug_seed,
            "moved": completion.moved,
            "timings": self._talk.timings | completion.timings,
            "version": __version__,
        })  # fmt: skip

    def _line(self, record: dict) -> None:
        self._write(json.dumps(record) + "\n")
