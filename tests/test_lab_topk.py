"""The top-k shift: its numbers, its bars, its colours, and what the command refuses."""

import csv
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from engines import add_tokenizer
from scipy.special import softmax
from scipy.stats import entropy, rankdata, sem

import tinydrug
from tinydrug.cli import main
from tinydrug.cli.lab.topk import histogram
from tinydrug.errors import ConfigError, DrugError, PromptError
from tinydrug.lab.tokens import bar, likeliest, shown
from tinydrug.lab.topk import topk

PROMPT = "Tell me of the sea"
CHECKOUT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return add_tokenizer(tiny.build("llama-gqa", tmp_path_factory.mktemp("topk") / "gqa"))


@pytest.fixture(scope="module")
def engine(folder):
    with tinydrug.load(folder, ctx=128, cache="f32") as engine:
        yield engine


@pytest.mark.parametrize("prompt", ["all", "last"])
def test_numbers_are_those_of_separate_runs(engine, prompt):
    shift, ids = topk(engine, PROMPT, f"V:0.9,prompt={prompt}", 5, (3, 4, 5)), engine.encode(PROMPT)
    rows = []
    for seed in (3, 4, 5):
        session = engine.session("V:0.9", seed)
        rows.append(session.feed(ids, prompt)[0])
    sober = softmax(engine.forward(ids)[-1].astype("f8"))
    drugged = softmax(np.array(rows, "f8"), -1)
    best = np.argsort(-sober)[:5].tolist()
    expected = best + [t for t in np.argsort(-drugged.mean(0))[:5].tolist() if t not in best]
    assert shift.tokens.tolist() == expected
    np.testing.assert_allclose(shift.sober, sober[expected], rtol=1e-9)
    np.testing.assert_allclose(shift.drugged, drugged.mean(0)[expected], rtol=1e-9)
    np.testing.assert_allclose(shift.error, sem(drugged[:, expected]), rtol=1e-7)
    assert shift.rank.tolist() == (97 - rankdata(sober)[expected]).tolist()
    assert shift.rank_drugged.tolist() == (97 - rankdata(drugged.mean(0))[expected]).tolist()
    assert shift.kl == pytest.approx(np.mean([entropy(sober, q) for q in drugged]), rel=1e-9)


def test_none_of_the_prompt_would_be_no_shift(engine):
    assert topk(engine, PROMPT, "V:0.9").record["settings"]["prompt"] == "last"
    assert topk(engine, PROMPT, "V:0").kl == 0


@pytest.mark.parametrize(
    ("sober", "drugged", "full", "parts"),
    [
        (0.5, 0.5, 1, ("|||||", "")),
        (0.5, 0.2, 1, ("||", "---")),
        (0.2, 0.5, 1, ("||", "+++")),
        (0, 0, 1, ("", "")),
        (0, 1, 1, ("", "++++++++++")),
        (0.2, 0.4, 0.4, ("|||||", "+++++")),
    ],
)
def test_bars(sober, drugged, full, parts):
    assert bar(sober, drugged, 10, full) == parts


def test_likeliest_breaks_ties_by_id():
    assert likeliest(np.array([0.1, 0.4, 0.1, 0.4]), 3).tolist() == [1, 3, 0]


def test_tokens_stay_on_their_line(engine):
    names = [shown(engine.tokenizer, token) for token in range(96)]
    assert names[3] == "␣" and names[4] == "↵" and names[5] == "�"
    assert all(name and name.isprintable() for name in names)


@pytest.mark.parametrize(
    ("more", "kind", "message"),
    [
        ({"k": 0}, ConfigError, "--top: 0 is not a whole number of at least 1"),
        ({"k": "x"}, ConfigError, "--top: 'x' is not"),
        ({"seeds": ()}, ConfigError, "--seeds: there must be at least one"),
        ({"drug": "X:1"}, DrugError, "there is no site"),
        ({"drug": "V:1,sink=99"}, PromptError, "noise leaves the first 99 alone"),
        ({"prompt": "Hi"}, PromptError, "the text has 2 tokens"),
    ],
)
def test_bad_arguments(engine, more, kind, message):
    with pytest.raises(kind, match=message):
        topk(engine, **{"prompt": PROMPT, "drug": "V:0.9"} | more)


def test_histogram_is_plain_in_a_pipe(engine, monkeypatch):
    lines = histogram(topk(engine, PROMPT, "V:1.5", 4)).splitlines()
    assert "\x1b" not in "".join(lines) and len(lines) >= 5
    for line in lines[1:]:
        assert re.fullmatch(r"\S+ +[01]\.\d{3} +[01]\.\d{3} +\d+ > \d+( +\|*[-+]*)?", line)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert "\x1b[32m" in histogram(topk(engine, PROMPT, "V:1.5", 4))
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in histogram(topk(engine, PROMPT, "V:1.5", 4))


def test_command(folder, tmp_path, capsys):
    words = ["lab", "topk", "-m", str(folder), "-p", PROMPT, "--drug", "V:0.9", "-k", "3", "--seeds", "1-4"]
    assert main([*words, "--csv", str(tmp_path / "a.csv"), "--json", str(tmp_path / "a.json")]) == 0
    out = capsys.readouterr()
    with open(tmp_path / "a.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    data = json.loads((tmp_path / "a.json").read_text())
    assert len(rows) == len(out.out.splitlines()) - 1 == len(data["tokens"])
    assert data["record"]["settings"]["seeds"] == [1, 2, 3, 4] and "KL(sober||drugged)" in out.err


def test_command_colours_a_terminal(folder):
    """A pseudo-terminal gets colours; with NO_COLOR it gets none."""
    words = ["lab", "topk", "-m", str(folder), "-p", PROMPT, "--drug", "V:0.9", "-q"]
    for more, colored in (({}, True), ({"NO_COLOR": "1"}, False)):
        ours, theirs = pty.openpty()
        env = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
        env |= {"TERM": "xterm-256color"} | more
        done = subprocess.Popen(
            [sys.executable, str(CHECKOUT / "cli.py"), *words], stdout=theirs, stderr=theirs, env=env
        )
        os.close(theirs)
        text = b""
        while True:
            try:
                chunk = os.read(ours, 65536)
            except OSError:  # the other side is closed
                break
            if not chunk:
                break
            text += chunk
        os.close(ours)
        assert done.wait(60) == 0 and (b"\x1b[3" in text) == colored


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give the noise by --drug or --drug-file"),
        (["--drug", "V:0.1", "--drug-file", "x.toml"], "give the noise by --drug or --drug-file"),
        (["--drug", "V:0.1", "-k", "0"], "at least 1"),
        (["--drug", "V:0.1", "--seeds", "3-1"], "is not a whole number"),
        (["--drug", "V:0.1", "--csv", "/no/such/folder/x.csv"], "/no/such/folder/x.csv: cannot be written"),
    ],
)
def test_bad_words_are_one_line(folder, words, message, capsys):
    assert main(["lab", "topk", "-m", str(folder), "-p", PROMPT, *words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ") and message in lines[-1]
