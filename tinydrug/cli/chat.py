"""The interactive chat, or with a base model a loop of completions: line editing, history, /commands."""

import difflib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tinydrug.api import Completion
from tinydrug.cli.console import Console
from tinydrug.cli.output import PlainText, WholeFile, to_stdout
from tinydrug.cli.talk import Talk, speeds
from tinydrug.errors import ContextOverflow, TinydrugError

HISTORY = 1000  # lines kept from one chat to the next


class Chat:
    """A conversation on a terminal. With a base model a line starts a text, and an empty one continues it."""

    def __init__(self, talk: Talk, console: Console):
        self._talk, self._console = talk, console
        self._messages: list[dict] = talk.opening()  # of a chat: {"role", "content"}
        self._texts: list[str] = []  # of a base model: what was typed, with what it made of it
        self._ids: list[int] = []  # of the last of these
        self._last: Completion | None = None

    def run(self, first: str | None, single: bool) -> int:
        """Converse until the user leaves, or `single` answer -> the exit status. `first` needs no typing."""
        talk = self._talk
        kind = "a chat" if talk.chat else "a base model: it continues what you type, Enter alone goes on"
        self._console.say(f"{talk.engine.name}, {kind}; /help lists the commands, Ctrl-D leaves")
        self._console.say(f"drug {talk.session.schedule}, seed {talk.seed}")
        with _history() as editing:
            try:
                for line in self._lines(first, editing):
                    if line.startswith("/"):
                        if self._command(line) == LEAVE:
                            break
                    elif self._turn(line) and single:
                        break
            except KeyboardInterrupt:
                return 130
        return 0

    def _lines(self, first: str | None, editing: bool) -> Iterator[str]:
        """What is typed, until Ctrl-D. KeyboardInterrupt at the second Ctrl-C in a row."""
        marks = [self._mark(text, editing) for text in ("> ", ". ")]
        if first is not None:
            to_stdout(f"> {first}\n")
            yield first
        interrupted = False
        while True:
            try:
                with self._talk.sobering():
                    line = input(marks[0])
                    while line.endswith("\\"):
                        line = f"{line[:-1]}\n{input(marks[1])}"
            except EOFError:
                to_stdout("\n")
                return
            except KeyboardInterrupt:
                to_stdout("\n")
                if interrupted:
                    raise
                interrupted = True
                self._console.say("Ctrl-C again or Ctrl-D leaves")
            except UnicodeDecodeError as error:
                self._console.error(f"not UTF-8 text: {error.reason}")
            else:
                interrupted = False
                yield line

    def _mark(self, text: str, editing: bool) -> str:
        """The prompt of a line; the editor must know which of its characters take no room."""
        colored = self._console.paint("user", text)
        return colored.replace("\x1b[", "\x01\x1b[").replace("m", "m\x02") if editing else colored

    def _turn(self, text: str) -> bool:
        """Answer one line; False if nothing was answered."""
        text = text[1:] if text.startswith(" /") else text
        out = PlainText(to_stdout)
        try:
            if self._talk.chat:
                completion = self._reply(text, out) if text.strip() else None
            else:
                completion = self._continue(text, out) if text or self._ids else None
        except TinydrugError as error:
            self._console.error(str(error))
            return False
        if completion is None:
            return False
        out.end()
        self._last = completion
        full = "; the context is full, /reset empties it" if completion.finish_reason == "context" else ""
        self._console.say(speeds(completion) + full)
        return True

    def _reply(self, text: str, out: PlainText):
        """The model's answer in the conversation so far; with --context-shift its oldest turns may go."""
        messages = [*self._messages, {"role": "user", "content": text}]
        first = len(self._talk.opening())
        while True:
            try:
                completion = self._talk.answer(messages, out.step)
                break
            except ContextOverflow:
                if not self._talk.shifts or len(messages) <= first + 2:
                    raise
                del messages[first : first + 2]
                self._console.say("the context is full: the oldest question and its answer are forgotten")
        if completion.ids:  # else stopped before it began
            self._messages = [*messages, {"role": "assistant", "content": completion.text}]
        return completion

    def _continue(self, text: str, out: PlainText):
        """What a base model makes of a new text, or of the last one if this one is empty."""
        completion = self._talk.answer(text or self._ids, out.step)
        self._ids = [*completion.prompt_ids, *completion.ids]
        if text:
            self._texts.append(text)
        self._texts[-1] += completion.text
        return completion

    # --- commands -------------------------------------------------------------------------------------------
    def _command(self, line: str):
        """Obey a line that begins with a slash."""
        word, _, argument = line.partition(" ")
        if word not in COMMANDS:
            near = difflib.get_close_matches(word, COMMANDS)
            advice = f"did you mean {near[0]}?" if near else "/help lists them"
            self._console.error(f"there is no {word}: {advice} (a space in front makes it text)")
            return None
        try:
            return COMMANDS[word][0](self, argument.strip())
        except TinydrugError as error:
            self._console.error(str(error))
        except OSError as error:
            self._console.error(f"{error.filename}: {error.strerror}")

    def _help(self, _):
        for word, (_, argument, what) in COMMANDS.items():
            self._console.line(f"{f'{word} {argument}':<14} {what}")
        self._console.line("A line that ends in a backslash goes on in the next. Ctrl-C stops an answer.")

    def _reset(self, _):
        self._messages, self._texts, self._ids = self._talk.opening(), [], []
        self._console.say("all forgotten")

    def _save(self, path):
        if not path:
            return self._console.error("/save FILE: the name is missing")
        texts = [f"{message['role']}: {message['content']}" for message in self._messages]
        with WholeFile(os.path.expanduser(path), "/save") as write:
            write("".join(f"{text}\n\n" for text in texts + self._texts))
        self._console.say(f"saved to {path}")

    def _record(self, path):
        if not path:
            return self._console.error("/record FILE: the name is missing")
        if self._last is None:
            return self._console.error("/record: nothing is answered yet")
        with WholeFile(os.path.expanduser(path), "/record") as write:
            write(self._last.record.to_json())
        self._console.say(f"recorded in {path}: tinydrug replay {path}")

    def _drug(self, doses):
        if doses:
            self._talk.dose(doses)
        self._console.say(f"drug {self._talk.session.schedule}")

    def _sober(self, _):
        self._drug("sober")

    def _show(self, _):
        self._console.line(self._talk.describe())
        self._console.line(self._talk.moved())

    def _quit(self, _):
        return LEAVE


@contextmanager
def _history() -> Iterator[bool]:
    """Line editing, with what was typed in earlier chats; whether there is any."""
    try:
        import readline
    except ImportError:
        yield False
        return
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    path = Path(state) / "tinydrug" / "history"
    readline.set_history_length(HISTORY)
    with suppress(OSError):  # none yet, or not ours to read: the chat works without
        readline.read_history_file(path)
    try:
        yield True
    finally:
        with suppress(OSError):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            readline.write_history_file(path)


LEAVE = "leave"
COMMANDS = {  # word: what it does, its argument, its help
    "/help": (Chat._help, "", "this list"),
    "/reset": (Chat._reset, "", "forget what was said"),
    "/save": (Chat._save, "FILE", "write what was said to a file"),
    "/record": (Chat._record, "FILE", "write what `tinydrug replay` needs to give the last answer again"),
    "/drug": (Chat._drug, "SPEC", "noise from the next answer on, as for --drug; without SPEC: what is used"),
    "/sober": (Chat._sober, "", "no noise from the next answer on"),
    "/show": (Chat._show, "", "the noise of every layer and site, and how many vectors it moved"),
    "/quit": (Chat._quit, "", "leave, as Ctrl-D does"),
    "/exit": (Chat._quit, "", "the same"),
}
