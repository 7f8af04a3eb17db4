"""Standard error: what is said beside the text, and bars where that is a terminal."""

import logging
import os
import sys
import time

WIDTH = 24  # of a bar, in characters
PAUSE = 0.1  # seconds between two drawings of it
STYLES = {"error": "1;31", "warning": "33", "user": "1;32", "aside": "2"}  # ANSI


class Console:
    """`with Console(...) as console:` also shows what the library logs: warnings, and with `verbose` all."""

    def __init__(self, quiet: bool = False, verbose: bool = False, color: str = "auto"):
        self.quiet, self.verbose, self.color = quiet, verbose, color
        self.bars = not quiet and sys.stderr.isatty()
        self._bar, self._drawn = "", 0.0

    def __enter__(self) -> "Console":
        logger = logging.getLogger("tinydrug")
        self._handler = _Handler(self)
        self._level = logger.level
        logger.addHandler(self._handler)
        logger.setLevel(logging.ERROR if self.quiet else logging.DEBUG if self.verbose else logging.INFO)
        return self

    def __exit__(self, *exception) -> None:
        self.clear()
        logger = logging.getLogger("tinydrug")
        logger.removeHandler(self._handler)
        logger.setLevel(self._level)

    def say(self, text: str) -> None:
        """A line of information: not with --quiet."""
        if not self.quiet:
            self.line(self.paint("aside", text))

    def warn(self, text: str) -> None:
        if not self.quiet:
            self.line(f"{self.paint('warning', 'warning:')} {text}")

    def error(self, text: str) -> None:
        self.line(f"{self.paint('error', 'error:')} {text}")

    def line(self, text: str) -> None:
        """A line in any case."""
        self.clear()
        print(text, file=sys.stderr, flush=True)

    def bar(self, what: str, share: float) -> None:
        """Draw a bar, if this is a terminal and the last drawing is a while ago."""
        if self.bars and time.monotonic() - self._drawn > PAUSE:
            full = round(share * WIDTH)
            self._draw(f"{what} [{'#' * full}{'.' * (WIDTH - full)}] {share:4.0%}")
            self._drawn = time.monotonic()

    def clear(self) -> None:
        """Wipe the bar away, before anything else is written."""
        if self._bar:
            self._draw("")
            self._drawn = 0.0

    def _draw(self, text: str) -> None:
        # By spaces: a terminal of any kind understands them.
        print(f"\r{text:<{len(self._bar)}}", end="\r" if not text else "", file=sys.stderr, flush=True)
        self._bar = text

    def paint(self, style: str, text: str) -> str:
        """`text` in a colour, if that is wanted here."""
        return f"\x1b[{STYLES[style]}m{text}\x1b[0m" if self._colored() else text

    def _colored(self) -> bool:
        if self.color != "auto":
            return self.color == "always"
        plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
        return sys.stderr.isatty() and not plain


class _Handler(logging.Handler):
    """What the library logs, as lines of a console."""

    def __init__(self, console: Console):
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.levelno >= logging.WARNING:
            self._console.warn(text)
        else:
            self._console.say(text)
