"""The comparison at equal coherence on curves that are known, and the command from plan to picture."""

import json
import math
import shutil

import numpy as np
import pytest
from engines import add_tokenizer

from tinydrug.cli import main
from tinydrug.errors import ConfigError
from tinydrug.lab.variety import compare, curves, verdicts

RANDOM = np.random.default_rng(3)
PROMPTS = 30
# Vendi as a function of nats a token above sober, by family; and how large a level makes those.
TRUTH = {"temperature": lambda x: 1 + x, "V uniform": lambda x: 1 + 2 * x, "H uniform": lambda x: 1 + x / 2}
NATS = {
    "temperature": lambda level: 2 * level,
    "V uniform": lambda level: level**2,
    "H uniform": lambda level: 3 * level,
}
LEVELS = (0.25, 0.5, 1.0, 1.5)
SOBER_NLL = 0.5


def cell(prompt, family, level, nll, vendi, noise) -> dict:
    return {
        "prompt": f"p{prompt}", "condition": f"{family} {level}", "family": family, "level": level,
        "nll": nll,
        "fair_vendi": vendi + noise * RANDOM.normal() if level else math.nan, "fair_distinct_2": 0.5,
        "fair_self_bleu": 0.5, "coherent": 1.0 - level / 3, "loops": level / 6,
    }  # fmt: skip


def table(noise: float = 0.0) -> list[dict]:
    rows = []
    for prompt in range(PROMPTS):
        harder = noise * RANDOM.normal()
        rows.append(cell(prompt, "sober", 0.0, SOBER_NLL + harder, math.nan, noise))
        for family, truth in TRUTH.items():
            for level in LEVELS:
                nats = NATS[family](level)
                rows.append(cell(prompt, family, level, SOBER_NLL + harder + nats, truth(nats), noise))
    return rows


def test_curves_are_compared_where_they_are_equally_coherent():
    rows = compare(curves(table()), [math.exp(SOBER_NLL + nats) for nats in (0.25, 1.0)])
    by = {(round(math.log(row["perplexity"]) - SOBER_NLL, 2), row["family"]): row for row in rows}
    for (nats, family), row in by.items():
        assert row["fair_vendi"] == pytest.approx(TRUTH[family](nats)), (nats, family)
        assert row["more"] == pytest.approx(TRUTH[family](nats) - TRUTH["temperature"](nats))
        assert row["more_low"] == pytest.approx(row["more"]) == row["more_high"]
    assert by[1.0, "temperature"]["level"] == 0.5 and by[1.0, "V uniform"]["level"] == 1.0
    assert by[1.0, "V uniform"]["coherent"] == pytest.approx(1 - 1 / 3)
    assert by[1.0, "V uniform"]["loops"] == pytest.approx(1 / 6)
    said = verdicts(rows)[1]
    assert "more varied than temperature: V uniform; less varied than temperature: H uniform" in said


def test_intervals_hold_what_is_true():
    rows = compare(curves(table(noise=0.3)), [math.exp(SOBER_NLL + 1)])
    for row in rows:
        true = TRUTH[row["family"]](1.0)
        assert row["fair_vendi_low"] < row["fair_vendi"] < row["fair_vendi_high"]
        assert row["fair_vendi_low"] - 0.15 < true < row["fair_vendi_high"] + 0.15
        assert (row["more_low"], row["more_high"]) == (0, 0) or row["more_low"] < row["more"] < row[
            "more_high"
        ]
    again = compare(curves(table(noise=0.3)), [math.exp(SOBER_NLL + 1)])
    assert [row["family"] for row in rows] == [row["family"] for row in again]


def test_where_a_curve_does_not_go():
    rows = compare(curves(table()), [math.exp(SOBER_NLL - 0.1), math.exp(SOBER_NLL + 2.9)])
    assert all(math.isnan(row["fair_vendi"]) for row in rows if row["perplexity"] < math.exp(SOBER_NLL))
    far = {row["family"]: row["fair_vendi"] for row in rows if row["perplexity"] > math.exp(SOBER_NLL)}
    assert math.isnan(far["V uniform"]) and far["temperature"] == pytest.approx(3.9)
    assert "too few prompts get there: V uniform" in verdicts(rows)[1]


def test_a_curve_that_turns_back_counts_on_its_way_out():
    """Beyond the cliff loops make text likely again: the first crossing is the one."""
    rows = table()
    for row in rows:
        if row["family"] == "V uniform" and row["level"] == 1.5:
            row["nll"] = SOBER_NLL + 0.1
    (found,) = (
        row for row in compare(curves(rows), [math.exp(SOBER_NLL + 0.25)]) if row["family"] == "V uniform"
    )
    assert found["level"] == pytest.approx(0.5)


def test_incomplete():
    rows = table()
    with pytest.raises(ConfigError, match="no sober text"):
        curves([row for row in rows if row["family"] != "sober"])
    with pytest.raises(ConfigError, match="no family is complete"):
        curves([row for row in rows if row["family"] == "sober"])
    assert set(curves(rows[:-1])) == {"temperature", "V uniform"}, (
        "one cell is missing: it cannot be compared"
    )
    with pytest.raises(ConfigError, match="no family 'heat' to compare with, only temperature"):
        compare(curves(rows), against="heat")


PLAN = """
seeds = 3
n = 16
match = 3
max_perplexity = 1e6
ignore_eos = true
baselines = false
[[prompt]]
text = "ab"
chat = false
[[prompt]]
text = "The sea"
chat = false
[grid]
sites = ["V"]
doses = [0.4, 0.9]
[[family]]
name = "temperature"
temperature = [0.5, 1.0, 2.0]
"""


@pytest.fixture(scope="module")
def model(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("variety") / "tiny"
    shutil.copytree(tiny_model("llama-mha"), folder)
    return add_tokenizer(folder)


def test_command(model, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: the [lab] extra")
    (tmp_path / "plan.toml").write_text(PLAN)
    out = tmp_path / "out"
    words = [
        "lab",
        "variety",
        str(tmp_path / "plan.toml"),
        "-m",
        str(model),
        "-o",
        str(out),
        "--workers",
        "1",
    ]
    assert main([*words, "--perplexity", "8", "12"]) == 0
    text = capsys.readouterr().out
    assert "at a sober perplexity of 8, " in text and "temperature" in text and "nan" not in text
    rows = json.loads((out / "variety.json").read_text())
    assert {row["family"] for row in rows} == {"V uniform", "temperature"} and len(rows) == 4
    assert (out / "variety.png").read_bytes()[:4] == b"\x89PNG" and (out / "variety.csv").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--perplexity", "0.5"], "not above 1"),
        (["--perplexity", "x"], "'x'"),
        (["--against", "heat"], "heat"),
        (["--against", "sober"], "the plan has no family 'sober'"),
    ],
)
def test_bad_words(more, said, model, tmp_path, capsys):
    (tmp_path / "plan.toml").write_text(PLAN)
    words = ["lab", "variety", str(tmp_path / "plan.toml"), "-m", str(model), "-o", str(tmp_path / "out")]
    assert main([*words, *more]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (tmp_path / "out").exists()
