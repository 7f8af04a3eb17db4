"""Token ids to text as they come: never half a character, never a word taken back."""

import codecs

from tinydrug.errors import ConfigError


class Detokenizer:
    """The text of a growing sequence: all pushes and the flush, joined, are `tokenizer.decode` of all ids.

    Bytes wait for the rest of their character. Byte tokens of a SentencePiece vocabulary wait for the end of
    their run, because one broken character spoils the whole run there, as in Hugging Face's ByteFallback.
    `continues`: the sequence goes on from text already shown, so the space before its first word stays.
    """

    def __init__(self, tokenizer, *, skip_special: bool = True, continues: bool = False):
        self._piece = tokenizer.piece
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace") if tokenizer.byte_level else None
        self._run = bytearray()
        self._strip = 0 if continues else tokenizer.strip

    def push(self, token_id: int) -> str:
        """The text that this token makes final, often a word, sometimes nothing."""
        if token_id in self._skipped:
            return ""
        piece = self._piece(token_id)
        if self._utf8 is not None:
            return self._start(self._utf8.decode(piece))
        if isinstance(piece, bytes):
            self._run += piece
            return ""
        return self._start(self._end_run() + piece)

    def flush(self) -> str:
        """What was waiting; a character that never came whole is U+FFFD."""
        return self._start(self._utf8.decode(b"", final=True) if self._utf8 is not None else self._end_run())

    def _end_run(self) -> str:
        run = bytes(self._run)
        self._run.clear()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(run)

    def _start(self, text: str) -> str:
        """`text` without the spaces that decoding drops at the start of a sequence."""
        while self._strip and text:
            self._strip = self._strip - 1 if text[0] == " " else 0
            text = text.removeprefix(" ")
        return text


class StopStrings:
    """Ends a stream of text at the first stop string, however the text is cut into pushes.

    First is what is complete first; of two that end together, the longer. ConfigError for an empty one.
    """

    def __init__(self, stops):
        self._stops = tuple(stops)
        if not all(isinstance(stop, str) and stop for stop in self._stops):
            raise ConfigError("stop: every stop string must be text and not empty", field="stop")
        self._held = ""
        self._hit = False

    def push(self, text: str) -> tuple[str, bool]:
        """(text that is safe to show, whether a stop string was met); nothing comes after a stop string."""
        if self._hit:
            return "", True
        text = self._held + text
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            self._held, self._hit = "", True
            return text[: min(found)[1]], True
        safe = len(text) - self._n_open(text)
        self._held = text[safe:]
        return text[:safe], False

    def flush(self) -> str:
        """The text held back, when no more will come."""
        held, self._held = self._held, ""
        return held

    def _n_open(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = max(map(len, self._stops), default=1) - 1
        ends = range(min(longest, len(text)), 0, -1)
        return next((n for n in ends if any(stop.startswith(text[-n:]) for stop in self._stops)), 0)
