"""Sweeps: plans, batches against single runs, kills at any moment, processes, a cluster, tables, errors."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from engines import add_tokenizer
from scipy import stats

import tinydrug
from tinydrug.api import Job as Generation
from tinydrug.api import Options
from tinydrug.cli import main
from tinydrug.engine.record import Record
from tinydrug.engine.sampling import Sampling
from tinydrug.errors import ConfigError, TinydrugError
from tinydrug.lab import work
from tinydrug.lab.cells import cells, conditions
from tinydrug.lab.plan import Plan, load_plan, read_plan, read_saved
from tinydrug.lab.results import record
from tinydrug.lab.store import Store
from tinydrug.lab.sweep import opened, sweep

CHECKOUT = Path(__file__).resolve().parent.parent
DEADLINE = 120  # seconds: a first run compiles
SMALL = {
    "prompts": ["ab", "The sea"],
    "seeds": 3,
    "n": 12,
    "match": 3,
    "max_perplexity": 1e6,
    "ignore_eos": True,
    "baselines": False,
    "grid": {"sites": ["H", "V"], "doses": [0.3, 0.9]},
    "family": [{"name": "temperature", "temperature": [0.7, 1.5]}],
}
SMALL["prompt"] = [{"text": name, "chat": False} for name in SMALL.pop("prompts")]


@pytest.fixture(scope="module")
def model(tiny_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sweep") / "tiny"
    shutil.copytree(tiny_model("llama-mha"), folder)
    return add_tokenizer(folder)


@pytest.fixture(scope="module")
def engine(model):
    with tinydrug.load(model, threads=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def about(engine):
    return record(engine, "sweep")


def plan(**changes) -> Plan:
    return read_plan(SMALL | changes)


def here(engine):
    return lambda jobs, pulse: work.rows(engine, jobs, 4, pulse)


def lines(path) -> list[bytes]:
    return (path / "runs.jsonl").read_bytes().splitlines(keepends=True)


@pytest.fixture(scope="module")
def whole(engine, about, tmp_path_factory):
    """The folder of an uninterrupted sweep of SMALL."""
    path = tmp_path_factory.mktemp("whole")
    assert sweep(plan(), about, path, here(engine)).complete
    return path


# --- continuous batching ------------------------------------------------------------------------------------
def test_a_batch_is_as_if_each_ran_alone(engine):
    """Different prompts, schedules, samplers, seeds, lengths and stops together, places taken over as others
    end, prompts longer than a chunk: all bits as in runs of one."""
    long = [3 + i % 90 for i in range(60)]
    jobs = [
        Generation(prompt, drug, Options(n=n, drug_seed=seed, ignore_eos=True, stop=stop, sampling=sampling))
        for seed, (prompt, drug, n, stop, sampling) in enumerate([
            ([5, 6, 7], None, 9, (), None),
            ([5, 6, 7, 8, 9, 10, 11, 12], "V:0.9,H:0.2", 30, (), None),
            ([5, 6, 7], "K:1.5", 1, (), None),
            (long, "A:1.2,prompt=all", 25, (), Sampling(temperature=1.2, seed=8)),
            (long, "A:1.2,sink=0", 25, (), Sampling(temperature=1.2, top_p=0.9, seed=9)),
            ([5, 6, 7], "H:0.4", 0, (), None),
            (long, "Q:0.9,prompt=last", 40, ("a", "b", "c", "d", "e"), Sampling(temperature=2.0, seed=1)),
            (long[:40], "pK:1.0", 80, (), Sampling(repeat_penalty=1.4, seed=1)),
            ([5, 6], "V:0.9", 126, (), None),
            (long, "V:0.9", 10, (), None),
        ])
    ]  # fmt: skip
    for places in (1, 3, 32):
        got = dict(engine.batch(iter(jobs), places))
        assert sorted(got) == list(range(len(jobs)))
        for i, job in enumerate(jobs):
            options = {name: getattr(job.options, name) for name in ("n", "drug_seed", "stop", "sampling")}
            alone = engine.generate(job.prompt, drug=job.drug, ignore_eos=True, **options)
            for field in ("ids", "text", "finish_reason", "moved", "prompt_ids"):
                assert getattr(got[i], field) == getattr(alone, field), (places, i, field)
    assert engine.replay(got[6].record).ids == got[6].ids


def test_a_batch_rewinds(model):
    with tinydrug.load(model, threads=1, rewind_every=5, chunk=16) as engine:
        jobs = [Generation([5, 6, 7 + i], "V:1.5,sink=0", Options(n=40, drug_seed=i)) for i in range(5)]
        for i, completion in engine.batch(jobs, 2):
            assert (
                completion.ids == engine.generate(jobs[i].prompt, drug="V:1.5,sink=0", n=40, drug_seed=i).ids
            )


def test_a_bad_job_is_told(engine):
    with pytest.raises(TinydrugError, match="context holds 128"):
        list(engine.batch([Generation([5] * 200)]))


def test_score_after_is_the_score_of_the_whole(engine):
    ids = [3 + (7 * i) % 90 for i in range(50)]
    whole = engine.score(ids).logprobs
    for split in (1, 7, 49):
        np.testing.assert_allclose(
            engine.score_after(ids[:split], ids[split:]).logprobs, whole[split - 1 :], atol=1e-5
        )
    assert len(engine.score_after(ids, []).logprobs) == 0


# --- plans --------------------------------------------------------------------------------------------------
def test_plan():
    found = plan()
    names = [condition.name for condition in found.conditions]
    assert names == [
        *("sober", "H:0.3~uniform", "H:0.9~uniform", "V:0.3~uniform", "V:0.9~uniform"),
        *("temperature T 0.7", "temperature T 1.5"),
    ]
    assert [condition.level for condition in found.conditions] == [0, 0.3, 0.9, 0.3, 0.9, 0.7, 1.5]
    assert len(found.jobs) == 2 * (1 + 6 * 3), "seeds change nothing for sober greedy text"
    assert len({job.id for job in found.jobs}) == len(found.jobs)
    assert read_saved(json.loads(json.dumps(found.to_dict()))) == found


def test_plan_of_any_family():
    doses = {"H": [0.1], "V": ["kl=0.05", "3deg"]}
    found = read_plan(
        {
            "prompts": ["a"],
            "seeds": [4, 9],
            "grid": {
                "sites": ["H", "V"],
                "laws": ["sign", "gauss+held"],
                "doses": doses,
                "where": "0.3..0.5",
            },
            "family": [
                {"name": "both", "drug": "A:0.1", "temperature": [0.5, 1]},
                {"name": "mine", "drug": ["V:0.1@2", "V:0.1,H:0.1"]},
                {"name": "penalty", "repeat_penalty": [1.1]},
            ],
        }
    )
    by_name = {condition.name: condition for condition in found.conditions}
    assert by_name["V:kl=0.05@0.3..0.5~sign"].level == 0.05
    assert by_name["V:3deg@0.3..0.5~gauss+held"].level == pytest.approx(np.deg2rad(3))
    assert by_name["both T 0.5"].drug == "A:0.1" and by_name["V:0.1@2"].level == 0.1
    assert by_name["V:0.1,H:0.1"].level == 2 and not by_name["penalty 1.1"].is_random
    assert {"temperature T 1.0", "top-p 0.9 T 1.3", "min-p 0.1 T 1.6"} <= by_name.keys(), "baselines"
    assert found.seeds == (4, 9) and found.prompts[0].content == [{"role": "user", "content": "a"}]


@pytest.mark.parametrize(
    ("name", "jobs"), [("grid", 1350), ("variety", 12 * 5 * 30), ("repeat", 12 * 2 * 12)]
)
def test_plans_of_the_package(name, jobs):
    drugged = [job for job in load_plan(name).jobs if job.condition.drug != "sober"]
    assert len(drugged) == jobs


BAD_PLANS = [
    ("x = 1", "x: a plan has no such key"),
    ("prompts = 3", "prompts: 3 is not a list"),
    ("", "there are none"),
    ("prompts = []", "the list is empty"),
    ('prompts = [" "]', "one is empty"),
    ('prompts = ["a", "a"]', "prompt 'a' is there twice"),
    ("prompts = [1]", "is not a list of texts"),
    ('prompts = ["a"]\nseeds = 0', "seeds: 0 is not a number from 1 to 10000"),
    ('prompts = ["a"]\nseeds = 1000000000', "seeds: 1000000000 is not a number from 1 to 10000"),
    ('prompts = ["a"]\nseeds = []', "seeds: the list is empty"),
    ('prompts = ["a"]\nseeds = [1, 1]', "seed 1 is there twice"),
    ('prompts = ["a"]\nseeds = [-1]', "not in"),
    ('prompts = ["a"]\nseeds = true', "is not a list"),
    ('prompts = ["a"]\nn = 0', "n: 0 is not a number of tokens"),
    ('prompts = ["a"]\nn = "5"', "n: '5' is not"),
    ('prompts = ["a"]\nmax_perplexity = 1', "above 1"),
    ('prompts = ["a"]\nbaselines = 1', "true or false"),
    ('prompts = ["a"]\ngrid = 3', "[grid]"),
    ('prompts = ["a"]\n[grid]\nsites = ["H"]', "is not a list"),
    ('prompts = ["a"]\n[grid]\nsites = []\ndoses = [1]', "sites: the list is empty"),
    ('prompts = ["a"]\n[grid]\nsites = ["X"]\ndoses = [0.1]', "grid: "),
    ('prompts = ["a"]\n[grid]\nsites = ["H"]\nlaws = ["no"]\ndoses = [0.1]', "no"),
    ('prompts = ["a"]\n[grid]\nsites = ["H"]\ndoses = [-0.1]', "grid: "),
    ('prompts = ["a"]\n[grid]\nsites = ["H"]\ndoses = [true]', "True"),
    ('prompts = ["a"]\n[grid]\nsites = ["H"]\ndoses = []', "doses of H: the list is empty"),
    ('prompts = ["a"]\n[grid]\nsites = ["H", "V"]\n[grid.doses]\nH = [0.1]', "none for site V"),
    ('prompts = ["a"]\n[grid]\nsites = ["H", "H"]\ndoses = [0.1]', "is there twice"),
    ('prompts = ["a"]\n[[family]]\ntemperature = [1]', "name: it is missing"),
    ('prompts = ["a"]\n[[family]]\nname = "x"\ntemperature = 1', "must be a list"),
    ('prompts = ["a"]\n[[family]]\nname = "x"\ntemperature = [-1]', "--temp"),
    ('prompts = ["a"]\n[[family]]\nname = "x"\ntemperature = ["hot"]', "--temp"),
    ('prompts = ["a"]\n[[family]]\nname = "x"\ntop_q = [1]', "top_q"),
    ('prompts = ["a"]\n[family]\nname = "x"', "[[family]]"),
    ('[[prompt]]\nname = "x"', "text: it is missing"),
    ("[[prompt]]\ntext = 3", "is not a text"),
    ("prompts = [", "is not TOML"),
]


@pytest.mark.parametrize(("text", "said"), BAD_PLANS, ids=[said for _, said in BAD_PLANS])
def test_bad_plans(text, said, tmp_path, capsys):
    path = tmp_path / "plan.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_plan(path)
    assert said in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)
    assert main(["lab", "sweep", str(path), "-o", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_no_plan():
    with pytest.raises(ConfigError, match="no.toml: No such file.*grid, variety, repeat"):
        load_plan("no.toml")


# --- rows and stores ----------------------------------------------------------------------------------------
def test_rows_say_what_happened(engine, whole):
    found, store, about = opened(whole)
    assert found == plan() and about["model"]["name"] == "tiny"
    rows = [store.rows[job.id] for job in found.jobs]
    drugged = [row for row in rows if row["condition"].startswith(("H", "V"))]
    assert all(row["moved"] for row in drugged), "a dose that never reaches its vectors"
    assert not any(row["moved"] for row in rows if row not in drugged)
    sober = {row["prompt"]: row["ids"] for row in rows if row["condition"] == "sober"}
    strong = [row for row in drugged if ":0.9" in row["condition"]]
    assert sum(row["ids"] != sober[row["prompt"]] for row in strong) > len(strong) / 2
    row = next(row for row in rows if row["condition"] == "V:0.9~uniform" and row["seed"] == 2)
    shared = {"model": about["model"], "made_by": about["made_by"], "format": "tinydrug record 1"}
    again = Record.from_dict(
        shared | row["record"] | {name: row[name] for name in ("prompt_ids", "ids", "text")}
    )
    assert list(engine.replay(again).ids) == row["ids"]
    said = row["ids"][: row["tokens"]]
    assert row["nll"] == pytest.approx(-engine.score_after(row["prompt_ids"], said).logprobs.mean())


def test_every_way_of_working_gives_the_same(engine, about, model, whole, tmp_path):
    source = work.Source(str(model), threads=1)
    ways = {"places": lambda jobs, pulse: work.rows(engine, jobs, 32)}
    ways["processes"] = lambda jobs, pulse: work.on_processes(source, jobs, 2, 4, pulse)
    for name, do in ways.items():
        assert sweep(plan(), about, tmp_path / name, do).complete
        assert lines(tmp_path / name) == lines(whole), name


def test_a_cluster_gives_the_same(about, model, whole, tmp_path):
    distributed = pytest.importorskip("distributed", reason="distributed is not installed: the [dask] extra")
    folder = tmp_path / "scratch"
    cluster = distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, local_directory=str(folder)
    )
    with cluster:
        source = work.Source(str(model), threads=1)
        do = lambda *given: work.on_dask(source, given[0], cluster.scheduler_address, 4, given[1])  # noqa: E731
        assert sweep(plan(), about, tmp_path / "out", do).complete
        assert lines(tmp_path / "out") == lines(whole)
        broken = work.Source(str(model / "no"), threads=1)
        with pytest.raises(TinydrugError, match="no model"):
            list(work.on_dask(broken, plan().jobs, cluster.scheduler_address))


def test_no_cluster():
    pytest.importorskip("distributed", reason="distributed is not installed: the [dask] extra")
    with pytest.raises(ConfigError, match="--dask: "):
        list(work.on_dask(work.Source("x"), plan().jobs, "nonsense://nowhere:1"))


def test_without_the_extra(monkeypatch, about, tmp_path):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ConfigError, match=r"pip install 'tinydrug\[dask\]'"):
        list(work.on_dask(work.Source("x"), plan().jobs, "tcp://nowhere:1"))
    monkeypatch.setattr("tinydrug.lab.page.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"sacrebleu is not installed: pip install 'tinydrug\[lab\]'"):
        sweep(plan(), about, tmp_path, lambda jobs, pulse: iter(()))


def test_a_worker_that_fails_is_told(model):
    with pytest.raises(TinydrugError, match="no model"):
        list(work.on_processes(work.Source(str(model / "no"), threads=1), plan().jobs, 2))


def test_stopped_and_gone_on_with(engine, about, whole, tmp_path):
    """Ctrl-C after some rows, twice; nothing that was done is done again."""
    done, told = [], []

    def counting(jobs, pulse):
        done.append(len(jobs))
        yield from here(engine)(jobs, lambda: None)

    def stop_after(n):
        def progress(ready, total, left):
            told.append((ready, total))
            if len(told) > n:
                told.clear()
                raise KeyboardInterrupt

        return progress

    total = len(plan().jobs)
    assert not sweep(plan(), about, tmp_path, counting, stop_after(5)).complete
    assert len(lines(tmp_path)) == 5 and (tmp_path / "cells.csv").exists()
    assert not sweep(plan(), about, tmp_path, counting, stop_after(20)).complete
    tables = sweep(plan(), about, tmp_path, counting)
    assert tables.complete and done == [total, total - 5, total - 25]
    assert lines(tmp_path) == lines(whole)
    for name in ("cells.csv", "cells.json", "conditions.csv", "cliffs.json"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()
    assert sweep(plan(), about, tmp_path, counting).complete and done[3:] == [], "all is there"


def test_stopped_between_two_steps(engine, about, tmp_path):
    """Long before a first text is done."""
    told = []

    def progress(ready, total, left):
        told.append(ready)
        if len(told) == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # there is nothing to keep
        sweep(plan(), about, tmp_path, here(engine), progress)
    assert told == [0] * 8


@pytest.mark.parametrize("at", ["torn", "middle", "flipped", "empty", "garbage"])
def test_damaged_lines_are_done_again(at, engine, about, whole, tmp_path, caplog):
    good = lines(whole)
    damaged = {
        "torn": [*good[:7], good[7][: len(good[7]) // 2]],
        "middle": [*good[:3], good[3][:40] + b"\n", *good[4:]],
        "flipped": [*good[:3], good[3].replace(b'"seed": 1', b'"seed": 2', 1), *good[4:]],
        "empty": [],
        "garbage": [b"\xff\x00{]\n", b"[]\n", b'{"id": 3, "crc": 1}\n', b"null\n", *good[2:]],
    }[at]
    (tmp_path / "runs.jsonl").write_bytes(b"".join(damaged))
    assert sweep(plan(), about, tmp_path, here(engine)).complete
    assert lines(tmp_path) == good


def test_a_plan_may_grow(engine, about, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "out")
    grown = plan(seeds=4)
    done = []
    sweep(
        grown, about, tmp_path / "out", lambda jobs, pulse: (done.extend(jobs), here(engine)(jobs, pulse))[1]
    )
    assert {job.seed for job in done} == {3}
    shorter = plan(n=6)
    done.clear()
    sweep(
        shorter,
        about,
        tmp_path / "out",
        lambda jobs, pulse: (done.extend(jobs), here(engine)(jobs, pulse))[1],
    )
    assert len(done) == len(shorter.jobs), "another length is another job"


def test_folders_that_are_no_place_for_it(engine, about, whole, tmp_path):
    other = about | {"model": about["model"] | {"weights": "others"}}
    with pytest.raises(ConfigError, match="another model.*use another folder"):
        sweep(plan(), other, whole, here(engine))
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(ConfigError, match="not a sweep"):
        sweep(plan(), about, tmp_path, here(engine))
    with (
        Store.writing(tmp_path / "mine", about),
        pytest.raises(ConfigError, match="another sweep is writing"),
    ):
        sweep(plan(), about, tmp_path / "mine", here(engine))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be made a folder"):
        sweep(plan(), about, tmp_path / "file", here(engine))
    with pytest.raises(ConfigError, match="no sweep is there"):
        opened(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="no results yet"):
        opened(tmp_path / "mine")


# --- the command --------------------------------------------------------------------------------------------
TOML = """
seeds = 4
n = 60
match = 5
max_perplexity = 1e6
baselines = false
ignore_eos = true
[[prompt]]
text = "ab"
chat = false
[[prompt]]
text = "The sea"
chat = false
[grid]
sites = ["H", "V", "K", "A"]
doses = [0.2, 0.5, 0.9]
"""


def command(model, plan, out, *more) -> list[str]:
    words = [*(sys.executable, CHECKOUT / "cli.py", "lab", "sweep", plan, "-m", model), "-o", out, *more]
    return list(map(str, words))


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_any_moment(workers, model, tmp_path):
    """kill -9, again and again; in the end every byte is as if nothing had happened."""
    path = tmp_path / "plan.toml"
    path.write_text(TOML)
    total = len(load_plan(path).jobs)
    quietly = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    done = subprocess.run(command(model, path, tmp_path / "whole"), timeout=DEADLINE, **quietly)
    assert done.returncode == 0, done.stderr
    out, killed = tmp_path / "killed", 0
    for target in (1, total // 2):
        process = subprocess.Popen(
            command(model, path, out, "--workers", workers, "--places", 3), **quietly, start_new_session=True
        )
        deadline = time.monotonic() + DEADLINE
        while process.poll() is None and time.monotonic() < deadline:
            if (out / "runs.jsonl").exists() and len(lines(out)) >= target:
                process.kill()  # this one alone: its workers must notice
                killed += 1
                break
            time.sleep(0.002)
        process.communicate(timeout=DEADLINE)
        wait_for_the_group(process.pid)
    assert killed, "it was never caught at work"
    done = subprocess.run(command(model, path, out), timeout=DEADLINE, **quietly)
    assert done.returncode == 0, done.stderr
    assert lines(out) == lines(tmp_path / "whole") and len(lines(out)) == total
    for name in ("cells.csv", "conditions.csv", "cliffs.csv"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def wait_for_the_group(pid: int) -> None:
    """Until no process of it is left."""
    for _ in range(1000):
        try:
            os.killpg(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.01)
    os.killpg(pid, signal.SIGKILL)
    raise AssertionError("a worker outlived the one that started it")


def test_ctrl_c_keeps_what_is_done(model, tmp_path):
    path, out = tmp_path / "plan.toml", tmp_path / "out"
    path.write_text(TOML.replace("seeds = 4", "seeds = 200"))
    process = subprocess.Popen(
        command(model, path, out, "--workers", 2), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    while process.poll() is None and not ((out / "runs.jsonl").exists() and len(lines(out)) > 20):
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
    text, said = process.communicate(timeout=DEADLINE)
    assert process.returncode == 130 and b"goes on from here" in said and b"Traceback" not in said, said
    assert b"condition" in text and len(lines(out)) > 20
    wait_for_the_group(process.pid)


def test_command(model, tmp_path, capsys):
    path, out = tmp_path / "plan.toml", tmp_path / "out"
    path.write_text(TOML.replace("seeds = 4", "seeds = 1").replace("n = 60", "n = 8"))
    words = ["lab", "sweep", str(path), "-m", str(model), "-o", str(out), "--workers", "1"]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "V:0.9~uniform" in text and "cliff" in text and "nan" not in text
    rows = json.loads((out / "conditions.json").read_text())
    assert rows[0]["condition"] == "sober" and rows[0]["kl"] == 0 and rows[1]["kl"] > 0
    assert rows[0]["vendi"] is None and rows[1]["self_bleu"] is None, "one seed: no spread, and no failure"
    before = (out / "runs.jsonl").read_bytes()
    assert main(words) == 0 and (out / "runs.jsonl").read_bytes() == before


BAD_WORDS = [
    (["-o", "OUT", "nothing.toml"], "No such file"),
    ([], "required"),
    (["-o", "OUT", "--workers", "0"], "--workers"),
    (["-o", "OUT", "--place"], "--place"),
    (["-o", "OUT", "-m", "MODEL/no"], "no model"),
    (["PLAN", "-o", "PLAN", "-m", "MODEL"], "cannot be made a folder"),
    (["PLAN", "-o", "OUT", "-m", "MODEL", "--dask", "nonsense://x:1"], "--dask"),
    (["PLAN", "-o", "OUT", "--dask", "tcp://x:1", "--workers", "2"], "--workers: the cluster of --dask"),
    (["CHAT", "-o", "OUT", "-m", "MODEL"], "has no chat template: give its plan [[prompt]]"),
]


@pytest.mark.parametrize(("words", "said"), BAD_WORDS, ids=[said for _, said in BAD_WORDS])
def test_bad_words(words, said, model, tmp_path, capsys):
    if "--dask" in words:
        pytest.importorskip("distributed", reason="distributed is not installed: the [dask] extra")
    (tmp_path / "plan.toml").write_text(TOML)
    (tmp_path / "chat.toml").write_text('prompts = ["hello"]')
    names = {"OUT": tmp_path / "out", "PLAN": tmp_path / "plan.toml", "CHAT": tmp_path / "chat.toml"}
    given = [str(names.get(word, word)).replace("MODEL", str(model)) for word in words]
    assert main(["lab", "sweep", *given]) == 2
    error = capsys.readouterr().err
    assert said in error and error.splitlines()[-1].startswith("error: ") and "Traceback" not in error


# --- tables -------------------------------------------------------------------------------------------------
def made(found: Plan, text, nll=1.0) -> dict[str, dict]:
    """Rows as if each job had given text(job)."""
    rows = {}
    for job in found.jobs:
        said = text(job)
        rows[job.id] = {
            "id": job.id, "prompt": job.prompt.name, "condition": job.condition.name, "seed": job.seed,
            "text": said, "ids": list(said.encode()), "tokens": len(said), "ended": False,
            "nll": nll(job) if callable(nll) else nll, "nll_tail": 1.0, "moved": {}, "prompt_ids": [1],
        }  # fmt: skip
    return rows


def test_broken_text_is_not_varied_text():
    """The trap: at the larger dose every sample is other garbage. Plain Vendi is fooled, the fair is not."""
    found = plan(max_perplexity=20.0, seeds=6)

    def text(job):
        if job.condition.level < 0.9:
            return f"the fox ran home . it was {'red' if job.seed % 2 else 'old'}"
        return " ".join(f"{job.seed}x{i}" for i in range(9)) if job.seed else "the fox ran home . it was"

    rows = made(found, text, lambda job: 5.0 if job.condition.level == 0.9 and job.seed else 1.0)
    by_name = {row["condition"]: row for row in conditions(found, cells(found, rows), {})}
    low, high = by_name["V:0.3~uniform"], by_name["V:0.9~uniform"]
    assert high["vendi"] > 2 * low["vendi"]
    assert high["coherent"] == pytest.approx(1 / 6) and low["coherent"] == 1
    assert high["fair_samples"] == 2 and np.isnan(high["fair_vendi"]) and 1 < low["fair_vendi"] < 2
    assert low["perplexity"] == pytest.approx(np.e) and high["leaves_sober"] > 0
    counts = [1, 1, 1, 1, 1, 1]  # of first bytes: "t" of seed 0, then "1" to "5"
    assert low["first_entropy"] == 0 and high["first_entropy"] == pytest.approx(stats.entropy(counts))


def test_cliff():
    found = plan(grid={"sites": ["V"], "doses": [0.1, 0.2, 0.4, 0.8]}, max_perplexity=20.0)
    rows = made(found, lambda job: "a b c d", lambda job: 9.0 if job.condition.level >= 0.4 else 1.0)
    from tinydrug.lab.cliff import cliffs

    (row,) = cliffs(cells(found, rows), ["V uniform"])
    assert row["safe"] == 0.2 and row["cliff"] == pytest.approx(0.2 * 2**0.5)
    assert row["cliff_low"] == row["cliff_high"] == row["cliff"] and row["coherent_at_largest"] == 0


@pytest.mark.parametrize(
    ("prompts", "worst", "expected"),
    [
        (1, 9.0, {"safe": 0.2, "cliff": 0.2 * 2**0.5, "cliff_low": np.nan, "cliff_high": np.nan}),
        (3, 1.0, {"safe": 0.8, "cliff": np.nan, "cliff_low": np.inf, "cliff_high": np.inf}),
    ],
)
def test_cliff_without_an_interval_or_beyond(prompts, worst, expected):
    from tinydrug.cli.lab.sweep import summary
    from tinydrug.lab.cliff import cliffs

    found = plan(grid={"sites": ["V"], "doses": [0.1, 0.2, 0.4, 0.8]}, max_perplexity=20.0)
    table = cells(
        found, made(found, lambda job: "a b c d", lambda job: worst if job.condition.level >= 0.4 else 1.0)
    )
    name = table[0]["prompt"]
    table = [cell | {"prompt": f"p{i}"} for cell in table if cell["prompt"] == name for i in range(prompts)]
    (row,) = cliffs(table, ["V uniform"])
    for key, value in expected.items():
        assert row[key] == pytest.approx(value, nan_ok=True), key
    shown = summary(SimpleNamespace(conditions=[], cliffs=[row])).splitlines()[-1]
    assert shown.endswith(
        "(one whole prompt: no interval)" if prompts == 1 else "beyond 0.8 (beyond to beyond)"
    )


def test_no_dose_is_safe_where_sober_text_is_broken():
    from tinydrug.lab.cliff import cliffs

    found = plan(grid={"sites": ["V"], "doses": [0.1, 0.2]}, max_perplexity=20.0)
    (row,) = cliffs(cells(found, made(found, lambda job: "a b c d", 9.0)), ["V uniform"])
    assert np.isnan(row["safe"]) and row["cliff"] == 0.1


def test_tables_of_a_part(engine, about, tmp_path):
    """Sober text may not be there yet, nor all seeds."""
    found = plan()
    rows = made(found, lambda job: "a b c")
    some = dict(list(rows.items())[5:9])
    table = cells(found, some)
    assert all(np.isnan(cell["leaves_sober"]) for cell in table)
    empty = replace(found, match=50)
    assert all(row["fair_samples"] == 0 for row in conditions(empty, cells(empty, rows), {}))
