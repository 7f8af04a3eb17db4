"""Noise against repetition: the table on texts that are known, and the command from plan to picture."""

import json
import math
import shutil

import pytest
from engines import add_tokenizer

from tinydrug.cli import main
from tinydrug.errors import ConfigError
from tinydrug.lab.cells import cells, conditions
from tinydrug.lab.plan import read_plan
from tinydrug.lab.repeat import best, table

PLAN = {
    "prompts": ["a", "b", "c", "d"],
    "seeds": 2,
    "match": 20,
    "baselines": False,
    "grid": {"sites": ["V"], "doses": [0.1, 0.4, 0.8]},
    "family": [{"name": "repeat penalty", "repeat_penalty": [1.1]}],
}
VARIED = " ".join(f"word{i}" for i in range(40))
STUCK = "it goes on " * 15


def rows() -> list[dict]:
    """Sober text is stuck, noise of 0.4 frees half of it, 0.8 makes it perplexing, the penalty frees all."""
    plan, made = read_plan(PLAN), {}
    for job in plan.jobs:
        free = {"V:0.4~uniform": job.seed == 1, "V:0.8~uniform": True, "repeat penalty 1.1": True}
        text = VARIED if free.get(job.condition.name) else STUCK
        made[job.id] = {
            "id": job.id, "seed": job.seed, "text": text, "ids": [1], "tokens": 45, "ended": False,
            "nll": 3.0 if job.condition.level == 0.8 else 1.0, "nll_tail": 1.0,
        }  # fmt: skip
    return table(conditions(plan, cells(plan, made), {}))


def test_table():
    by = {row["condition"]: row for row in rows()}
    assert [by[name]["loops"] for name in by] == [1, 1, 0.5, 0, 0]
    assert by["sober"]["fair_rep_4"] == pytest.approx(1 - 3 / 17), (
        "of the first 20 words: 17 4-grams, 3 kinds"
    )
    assert by["V:0.4~uniform"]["fair_rep_4"] == pytest.approx((1 - 3 / 17) / 2)
    assert by["V:0.4~uniform"]["loops_low"] == by["V:0.4~uniform"]["loops_high"] == 0.5
    assert by["repeat penalty 1.1"]["perplexity"] == pytest.approx(math.e)


def test_the_best_of_each_family_is_not_bought_with_nonsense():
    said = best(rows())
    assert said[0].startswith("sober: 100% loop")
    assert said[1].startswith("V:0.4~uniform: 50% loop"), "0.8 has none, but is e^2 times as perplexing"
    assert said[2].startswith("repeat penalty 1.1: 0% loop")
    assert best(rows(), most=1.0)[1].startswith("V:0.4~uniform")
    assert "every dose makes the text more than 0.5 times" in best(rows(), most=0.5)[1]


def test_without_sober_text():
    with pytest.raises(ConfigError, match="no sober text"):
        table([row | {"family": "x"} for row in rows()])


TOML = """
seeds = 2
n = 40
match = 10
max_perplexity = 1e6
ignore_eos = true
baselines = false
[[prompt]]
text = "ab"
chat = false
[grid]
sites = ["V"]
doses = [0.4]
[[family]]
name = "repeat penalty"
repeat_penalty = [1.1, 1.3]
"""


def test_command(tiny_model, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: the [lab] extra")
    shutil.copytree(tiny_model("llama-mha"), tmp_path / "tiny")
    model, out = add_tokenizer(tmp_path / "tiny"), tmp_path / "out"
    (tmp_path / "plan.toml").write_text(TOML)
    words = ["lab", "repeat", str(tmp_path / "plan.toml"), "-m", str(model), "-o", str(out), "--workers", "1"]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "repeat penalty 1.3" in text and "rep-4 of 10 words" in text and "nan" not in text
    assert len(json.loads((out / "repeat.json").read_text())) == 4, "one prompt: no intervals, and no failure"
    assert (out / "repeat.png").read_bytes()[:4] == b"\x89PNG"
    assert main(["lab", "repeat", "no.toml", "-o", str(out)]) == 2
