"""`tinydrug bench`: llama-bench's flags and fields, figures that belong together, sequences put back exactly,
and bad input."""

import csv
import io
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
from argparse import ArgumentTypeError
from pathlib import Path

import engines
import numpy as np
import pytest
import tiny

from tinydrug import Schedule
from tinydrug.cli import bench, main
from tinydrug.noise import SITES

CHECKOUT = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, str(CHECKOUT / "cli.py"), "bench"]
DEADLINE = 120  # seconds: a first run compiles
LLAMA_BENCH = {  # what its JSON says of a CPU, as far as it means anything here
    *("build_commit", "cpu_info", "gpu_info", "backends", "model_filename", "model_type", "model_size"),
    *("model_n_params", "n_batch", "n_ubatch", "n_threads", "type_k", "type_v", "n_prompt", "n_gen"),
    *("n_depth", "test_time", "avg_ns", "stddev_ns", "avg_ts", "stddev_ts", "samples_ns", "samples_ts"),
}
OURS = {"isa", "quant", "drug", "drug_seed", "load_s", "compile_s"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return engines.add_tokenizer(tiny.build("llama-gqa", tmp_path_factory.mktemp("bench") / "gqa"))


@pytest.fixture
def table(folder):
    """table(*flags) -> what `tinydrug bench` prints with them."""

    def run(*flags) -> str:
        words = [*COMMAND, "-m", str(folder), "-t", "1", "-q", *flags]
        done = subprocess.run(words, capture_output=True, text=True, timeout=DEADLINE)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    return run


# --- what is measured -----------------------------------------------------------------------------------
def test_fields_and_figures_of_json(table, folder):
    rows = json.loads(table("-p", "8", "-n", "4", "-pg", "6,2", "-d", "0,16", "-r", "3", "-o", "json"))
    assert [(row["n_prompt"], row["n_gen"], row["n_depth"]) for row in rows] == [
        *((8, 0, 0), (0, 4, 0), (6, 2, 0)),
        *((8, 0, 16), (0, 4, 16), (6, 2, 16)),
    ]
    n_params = sum(array.size for array in tiny.weights("llama-gqa").values())
    for row in rows:
        assert set(row) == LLAMA_BENCH | OURS
        ns, tokens = row["samples_ns"], row["n_prompt"] + row["n_gen"]
        assert len(ns) == 3 and all(type(n) is int and n > 0 for n in ns)
        assert row["samples_ts"] == [1e9 * tokens / n for n in ns]
        assert (row["avg_ns"], row["stddev_ns"]) == (round(statistics.mean(ns)), round(statistics.stdev(ns)))
        assert row["avg_ts"] == pytest.approx(statistics.mean(row["samples_ts"]))
        assert row["stddev_ts"] == pytest.approx(statistics.stdev(row["samples_ts"]))
        assert row["model_n_params"] == n_params and row["model_filename"] == str(folder)
        assert row["n_threads"] == 1 and row["drug"] == "sober" and row["compile_s"] >= 0
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", row["test_time"])


def test_threads_drugs_and_repeated_flags_are_combined(table):
    flags = "-p", "0", "-n", "2", "-n", "3,4", "-t", "1", "-r", "1", "-o", "jsonl"
    rows = [json.loads(line) for line in table(*flags, "--drug", "sober,V:0.1 K:0.2").splitlines()]
    assert [(row["drug"], row["n_gen"]) for row in rows] == [
        (drug, n) for drug in ("sober", "V:0.1 K:0.2") for n in (2, 3, 4)
    ] * 2  # -t 1 twice: an engine each
    assert all(row["stddev_ts"] == row["stddev_ns"] == 0 for row in rows)


def test_forms(table):
    flags = "-p", "8", "-n", "2", "-d", "0,4", "-r", "2", "--drug", "A:0.1", "--quant", "q8"
    head, rule, *rows, blank, build = table(*flags).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (head, *rows)]
    assert cells[0] == [
        *("model", "size", "params", "backend", "threads", "drug", "compile s", "test", "t/s"),
    ]
    assert re.fullmatch(r"(\| -+[-:] )+\|", rule) and len({len(line) for line in (head, rule, *rows)}) == 1
    assert [row[7] for row in cells[1:]] == ["pp8", "tg2", "pp8 @ d4", "tg2 @ d4"]
    assert all(re.fullmatch(r"\d+\.\d\d ± \d+\.\d\d", row[8]) for row in cells[1:])
    assert all(row[0].startswith("llama 0.0") and row[0].endswith("q8") for row in cells[1:])
    assert blank == "" and build.startswith("build: ")

    names, *lines = csv.reader(io.StringIO(table(*flags, "-o", "csv")))
    assert set(names) == (LLAMA_BENCH | OURS) - {"samples_ns", "samples_ts"}
    assert len(lines) == 4 and all(len(line) == len(names) for line in lines)


def test_the_default_threads_are_all_that_may_be_used(folder, capsys):
    assert main(["bench", "-m", str(folder), "-q", "-p", "0", "-n", "1", "-r", "1", "-o", "jsonl"]) == 0
    assert json.loads(capsys.readouterr().out)["n_threads"] == len(os.sched_getaffinity(0))


@pytest.mark.parametrize("name", ["llama-gqa", "mistral-window"])  # the latter wraps its ring
def test_every_sample_begins_where_the_first_did(tiny_model, name):
    """A sample leaves nothing behind: neither tokens nor noise, and the moved vectors are those of its
    tokens."""
    run = engines.runtime(tiny_model(name), n_ctx=90, chunk=16)
    ids = [int(i) for i in tiny.ids(name)[:30]] * 3
    session = engines.session(run, "A:0.3,pK:0.2", 1)
    fresh = engines.logits(run, ids[:31])[-1]
    for depth, n_prompt, n_gen in ((30, 9, 0), (30, 0, 7), (30, 20, 33), (0, 3, 8)):
        before = session.moved[SITES["A"].code]
        assert bench.sample(session, bench.Test(n_prompt, n_gen), depth, ids) > 0
        assert session.ids == ids[: depth + n_prompt + n_gen]
        drugged = min(n_gen, session.pos - session.schedule.sink)  # the prompt is read sober
        each = run.config.n_layers * run.config.n_heads
        assert session.moved[SITES["A"].code] - before == drugged * each
        bench.turn_to(session, 30, ids)
        assert session.ids == ids[:30] and session.dirty == 0
        np.testing.assert_array_equal(session.feed(ids[30:31])[0], fresh)


def test_a_sample_sobers_up_as_a_generation_does(tiny_model):
    run = engines.runtime(tiny_model("llama-gqa"), n_ctx=90, rewind_every=8)
    session, ids = engines.session(run, "H:0.3", 1), [int(i) for i in tiny.ids("llama-gqa")[:40]]
    bench.sample(session, bench.Test(0, 8), 10, ids)
    assert session.dirty == 8
    bench.sample(session, bench.Test(0, 9), 10, ids)
    assert session.dirty == 1


# --- flags ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "text, numbers",
    [
        ("512", [512]),
        ("0,4096", [0, 4096]),
        ("1-4", [1, 2, 3, 4]),
        ("1-8+3", [1, 4, 7]),
        ("64-512*2,5", [64, 128, 256, 512, 5]),
    ],
)
def test_numbers_as_llama_bench_writes_them(text, numbers):
    assert bench._numbers(0)(text) == numbers


@pytest.mark.parametrize(
    "text", ["", "1,", "x", "-1", "1.5", "4-1", "0-8*2", "1-8*1", "1-8+0", "0-999999999"]
)
def test_numbers_that_make_no_sense(text):
    with pytest.raises(ArgumentTypeError):
        bench._numbers(0)(text)


@pytest.mark.parametrize(
    "flags, said",
    [
        (["-p", "many"], "-p/--n-prompt: 'many' is not a whole number"),
        (["-n", "-3"], "-n/--n-gen: "),
        (["-d", "8-1"], "-d/--n-depth: '8-1' is a range that goes nowhere"),
        (["-t", "0"], "-t/--threads: '0': at least 1 is needed"),
        (["-t", "99999"], "--threads: 99999 is not between 1 and "),
        (["-r", "0"], "-r/--repetitions: '0' is not a whole number of at least 1"),
        (["-pg", "512"], "-pg: '512' is not two whole numbers"),
        (["-p", "0", "-n", "0"], "nothing to run: -p, -n and -pg are all 0"),
        (["-o", "sql"], "-o/--output: invalid choice: 'sql'"),
        (["--quant", "q3"], "--quant: invalid choice: 'q3'"),
        (["--drug", "X:0.1"], "there is no site 'X'"),
        (["--drug", "sober V:0.1"], "sober and V:0.1 contradict each other"),
        (["--drug", "V:0.1@50"], "layer"),
        (["--flash-attn", "1"], "unrecognized arguments: --flash-attn 1"),
        (["-m", "no-such-model"], "no-such-model"),
        (["-d", "999999999"], "--ctx-size: "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_is_one_line(folder, capsys, flags, said):
    model = [] if "-m" in flags else ["-m", str(folder)]
    status = main(["bench", *model, "--offline", "-q", *flags])
    out, err = capsys.readouterr()
    assert status == 2 and not re.search(r"^\|.* tg", out, re.MULTILINE)
    assert err.startswith("error: ") and err.count("\n") == 1 and said in err


def test_a_dose_by_its_effect(folder, capsys):
    words = ["bench", "-m", str(folder), "-q", "-p", "8", "-n", "0", "-r", "1", "-o", "jsonl"]
    assert main([*words, "--drug", "V:kl=0.01"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["drug"] == "V:kl=0.01" and row["avg_ts"] > 0


def test_packed_weights_without_the_model_they_are_of(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TINYDRUG_HOME", str(tmp_path))
    shutil.copytree(folder, tmp_path / "gone")
    assert main(["quantize", "gone", "--quant", "q8", "-q"]) == 0
    shutil.rmtree(tmp_path / "gone")
    capsys.readouterr()
    words = ["bench", "-m", "gone", "--quant", "q8", "-q", "-p", "8", "-n", "0", "-r", "1", "-o", "jsonl"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["model_filename"] == str(tmp_path / "gone-q8")


def test_interrupted(folder):
    words = [*COMMAND, "-m", str(folder), "-q", "-p", "0", "-n", "4", "-r", "1", "-d", "0-50", "-o", "jsonl"]
    words += ["--drug", ",".join(["sober"] * 2000)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert json.loads(process.stdout.readline())["n_gen"] == 4
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=DEADLINE)[1]
    assert process.returncode == 130 and said == ""


def test_drugs_of_a_test():
    args = bench._parser().parse_args(["--drug", "sober,V:0.1 K:0.2", "--drug", "A:3deg"])
    assert args.drug == ["sober", "V:0.1 K:0.2", "A:3deg"]
    assert bench._schedule("V:0.1 K:0.2", args) == Schedule.parse("V:0.1,K:0.2")


# --- bench/, the scripts that hold figures against targets ------------------------------------------------
FAKE_LLAMA_BENCH = """#!{python}
import json, sys
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert open(flags["-m"], "rb").read(4) == b"GGUF" and flags["-o"] == "json" and flags["-r"] == "1"
tests = [(int(flags["-p"]), 0), (0, int(flags["-n"]))]
print(json.dumps([dict(n_prompt=p, n_gen=n, avg_ts=100.0 + p) for p, n in tests if p or n]))
"""


def test_every_target_in_one_table(tmp_path):
    """On a tiny shape: that all benchmarks run, and that ratios are held against targets."""
    peer = tmp_path / "llama-bench"
    peer.write_text(FAKE_LLAMA_BENCH.format(python=sys.executable))
    peer.chmod(0o755)
    sections = "end_to_end,batch,context,overhead,packed,busy,rewind,threads"
    words = [
        "-m",
        "bench.all",
        "--quick",
        "--shape",
        "tiny:q4",
        "--only",
        sections,
        "--scratch",
        str(tmp_path),
    ]
    done = subprocess.run(
        [sys.executable, *words, "--llama-bench", str(peer)],
        capture_output=True,
        text=True,
        cwd=CHECKOUT,
        timeout=DEADLINE,
    )
    assert done.returncode == 0, done.stderr
    *_, count, last = done.stdout.splitlines()
    result = json.loads(last)
    assert ",".join(result["sections"]) == sections and result["card"]["threads"] >= 1
    rows = [row for rows in result["sections"].values() for row in rows]
    for row in rows:
        assert row["ours"] > 0 and f"{row['what']}  " in done.stdout
        if row["theirs"] is not None:
            assert row["ratio"] == pytest.approx(row["ours"] / row["theirs"])
        if row["met"] is not None:
            figure = row["ours"] if row["ratio"] is None else row["ratio"]
            assert row["met"] == ((row["least"] or 0) <= figure <= (row["most"] or float("inf")))
    held = [row["met"] for row in rows if row["met"] is not None]
    assert count == f"{sum(held)} of {len(held)} targets met"
    (prefill,) = (row for row in rows if row["what"].endswith("prefill 64") and "llama" in row["against"])
    assert prefill["theirs"] == 164


def test_the_tail_of_chi_squared(monkeypatch):
    """Of bench.noise, against printed tables: five percent."""
    monkeypatch.syspath_prepend(CHECKOUT)
    from bench.noise import _chi2_tail

    for degrees, x in ((1, 3.8415), (2, 5.9915), (3, 7.8147), (6, 12.5916), (7, 14.0671), (20, 31.4104)):
        assert _chi2_tail(x, degrees) == pytest.approx(0.05, abs=1e-5)
