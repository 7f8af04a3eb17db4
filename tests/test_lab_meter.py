"""The meter against SciPy; angles by their effect: found, held, kept, and written anywhere."""

import csv
import json
import logging
import math

import numpy as np
import pytest
import tiny
from engines import add_tokenizer
from scipy.spatial.distance import jensenshannon
from scipy.special import kl_div, softmax
from scipy.stats import entropy, rankdata, sem

import tinydrug
from tinydrug.cli import main
from tinydrug.engine.calibrate import effects, solve, standard_error
from tinydrug.engine.forced import cut, divergence
from tinydrug.errors import DrugError, PromptError
from tinydrug.lab.meter import MEASURES, halves, measures, meter
from tinydrug.noise import SOBER, Dose, Effect, Schedule, load_schedule, parse_dose, save_schedule

TEXT = "Tell me of the sea, of the wind and of ships that sail by night. " * 20
LAWS = ("uniform", "gauss", "sign")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return add_tokenizer(tiny.build("llama-gqa", tmp_path_factory.mktemp("meter") / "gqa"), template)


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """Angles are kept in a folder of these tests; kernels, too, so they are linked there."""
    import os

    from tinydrug.kernels.jit import cache_folder

    kernels, base = cache_folder(), tmp_path_factory.mktemp("cache")
    patch = pytest.MonkeyPatch()
    if kernels is not None:
        os.symlink(kernels, base / kernels.name)
        patch.setattr("tinydrug.engine.angles.cache_folder", lambda: base / kernels.name)
    yield base
    patch.undo()


@pytest.fixture(scope="module")
def engine(folder):
    with tinydrug.load(folder, ctx=128, cache="f32") as engine:
        yield engine


# --- metrics


def logits(seed, spread, *shape):
    return (spread * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


@pytest.mark.parametrize("spread", [0.1, 3, 40])
def test_measures_are_scipys(spread):
    """Each by another function of SciPy than the meter uses, or by counting."""
    sober, drugged = logits(1, spread, 400), logits(2, spread, 400)
    p, q = (softmax(x.astype("f8")) for x in (sober, drugged))
    choice = int(np.argmax(drugged))
    expected = {
        "kl": entropy(p, q),
        "reverse": entropy(q, p),
        "js": jensenshannon(p, q) ** 2,
        "flip": choice != int(np.argmax(sober)),
        "rank": 401 - rankdata(sober)[choice],
        "p_choice": p[choice],
        "entropy": entropy(q) - entropy(p),
    }
    got = measures(sober, drugged)
    assert list(got) == list(MEASURES)
    np.testing.assert_allclose(list(got.values()), list(expected.values()), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(divergence(sober[None], drugged[None, None]), kl_div(p, q).sum(), rtol=1e-9)


def test_equal_distributions_do_not_differ():
    x = logits(1, 5, 300)
    assert measures(x, x) == pytest.approx(
        {"kl": 0, "reverse": 0, "js": 0, "flip": 0, "rank": 1, "p_choice": softmax(x).max(), "entropy": 0}
    )
    assert (divergence(x[None], x[None, None]) == 0).all()


def test_standard_error_takes_blocks():
    values = np.random.default_rng(0).normal(size=32 * 50 + 7)
    assert standard_error(values) == pytest.approx(sem(values[:1600].reshape(50, 32).mean(1)))
    assert math.isnan(standard_error(values[:63])) and standard_error(np.zeros(64)) == 0


def test_pieces_begin_like_texts():
    assert cut([1, 5, 6, 7, 8, 9], 3, bos=1) == [[1, 5, 6], [1, 7, 8], [1, 9]]
    assert cut([5, 6, 7], 2, bos=1) == [[5, 6], [7]] and cut([5, 6], 2, bos=None) == [[5, 6]]
    assert halves([[1], [2], [3]]) == ([[1], [3]], [[2]])


# --- the meter


def test_readings_are_those_of_separate_runs(engine):
    pieces = engine.pieces(TEXT, 100)[:3]
    schedules = [Schedule.parse(text) for text in ("V:0.6", "K:0.5@1,sink=20", "sober")]
    readings = meter(engine, pieces, schedules, seed=9)
    for schedule, reading in zip(schedules, readings, strict=True):
        values = []
        for piece in pieces:
            sober, drugged = engine.forward(piece), engine.forward(piece, schedule, 9)
            p, q = softmax(sober.astype("f8"), -1), softmax(drugged.astype("f8"), -1)
            flips = sober.argmax(-1) != drugged.argmax(-1)
            values.append(np.stack([entropy(p, q, axis=-1), flips], -1)[schedule.sink :])
        values = np.concatenate(values)
        assert reading.tokens == len(values) == sum(len(piece) - schedule.sink for piece in pieces)
        np.testing.assert_allclose([reading.mean["kl"], reading.mean["flip"]], values.mean(0), atol=1e-9)
        assert reading.error["kl"] == pytest.approx(standard_error(values[:, 0]), abs=1e-9)
    assert readings[2].mean["kl"] == 0 and readings[2].mean["rank"] == 1


def test_a_text_out_of_reach(engine):
    with pytest.raises(PromptError, match="noise leaves the first 6 tokens alone"):
        meter(engine, [[1, 2, 3]], [Schedule.parse("V:0.1")])
    with pytest.raises(PromptError, match="hold a part of it back"):
        halves([[1]])


def test_ctrl_c_keeps_the_pieces_that_were_read(engine):
    def progress(done, total, left):
        if done == 2:
            raise KeyboardInterrupt

    (reading,) = meter(engine, engine.pieces(TEXT, 50), [Schedule.parse("V:0.6")], progress=progress)
    assert reading.tokens == 2 * 44


# --- angles by their effect


@pytest.mark.parametrize("law", LAWS)
def test_angles_have_their_effect(engine, law):
    """Found on some pieces, of every site; on the pieces held back, under another seed, nearly the same."""
    doses = [parse_dose(f"{site}:kl=0.02~{law}") for site in ("H", "Q", "pK", "K", "V", "A", "M")]
    some, held = halves(engine.pieces(TEXT, 128))
    found = solve(engine.runtime, some, doses, seed=1)
    assert all(f.reached and abs(f.kl / 0.02 - 1) < 0.011 for f in found)
    assert [(f.dose.site, f.dose.law) for f in found] == [(dose.site, law) for dose in doses]
    schedules = [Schedule((f.dose,)) for f in found]
    for f, again in zip(found, effects(engine.runtime, some, schedules, 1), strict=True):
        assert np.concatenate(again).mean() == pytest.approx(f.kl, rel=1e-12)
    for kl in effects(engine.runtime, held, schedules, 2):
        values = np.concatenate(kl)
        assert abs(values.mean() - 0.02) < 4 * standard_error(values) + 0.002


@pytest.mark.parametrize("kl", [1e-6, 1e-3, 0.5])
@pytest.mark.parametrize("dose", ["V:0", "L2An:0@1", "NLQ:0~gauss+held", "K:0@0:2/0.5:1"])
def test_effects_of_all_sizes(engine, kl, dose):
    dose = parse_dose(dose.replace(":0", f":kl={kl}", 1))
    (found,) = solve(engine.runtime, engine.pieces(TEXT, 128)[:3], [dose])
    if found.reached:
        assert found.kl == pytest.approx(kl, rel=0.05) and found.dose.theta > 0
    else:
        assert kl == 0.5 and found.kl < kl


def test_no_effect_is_no_angle(engine):
    (found,) = solve(engine.runtime, engine.pieces(TEXT, 64), [parse_dose("V:kl=0")])
    assert found.dose.theta == 0 and found.reached
    assert engine.resolve("V:kl=0").is_sober


def test_a_ramp_is_measured_before_it_falls(engine):
    assert engine.resolve("V:kl=0.01~linear:5").doses[0].theta == engine.resolve("V:kl=0.01").doses[0].theta


def test_an_effect_that_nothing_has(engine):
    with pytest.raises(DrugError, match=r"drug V:kl=30@2: no angle has this effect, the nearest is KL"):
        engine.resolve("V:kl=30@2")


def test_angles_are_found_once(engine, own_cache, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "tinydrug")
    first = engine.resolve("A:kl=0.015~sign")
    assert "finding the angle of A:kl=0.015~sign" in caplog.text
    assert f"A:kl=0.015~sign is {first.doses[0]} on this model" in caplog.text
    monkeypatch.setattr("tinydrug.engine.angles.solve", lambda *args, **more: [])  # it would find none
    assert engine.resolve("A:kl=0.015~sign") == first
    with pytest.raises(ValueError):  # strict zip: another sink is another measurement
        engine.resolve("A:kl=0.015~sign,sink=0")
    monkeypatch.undo()
    files = sorted((own_cache / "angles").glob("*.json"))
    assert files and not list((own_cache / "angles").glob("*.partial"))
    for content in ("", "[1]", '{"theta": -1}', '{"theta": "x"}', "\x00"):
        for file in files:
            file.write_text(content)
        assert engine.resolve("A:kl=0.015~sign") == first  # damaged: found again


def test_an_own_law_is_not_kept(engine, own_cache):
    from tinydrug.engine.custom import FIRST_CODE
    from tinydrug.noise.laws import LAWS as known

    if "lopsided" not in known:
        tinydrug.register_law("lopsided", lambda u: u * u)
    before = set((own_cache / "angles").glob("*"))
    assert known["lopsided"].code >= FIRST_CODE
    assert engine.resolve("V:kl=0.01~lopsided").doses[0].theta > 0
    assert set((own_cache / "angles").glob("*")) == before


def test_a_folder_that_takes_nothing(engine, tmp_path, monkeypatch, caplog):
    (tmp_path / "angles").write_text("a file where the folder should be")
    monkeypatch.setattr("tinydrug.engine.angles.cache_folder", lambda: tmp_path / "jit")
    assert engine.resolve("V:kl=0.011").doses[0].theta > 0
    assert "the angle of V:kl=0.011 is not kept" in caplog.text
    monkeypatch.setattr("tinydrug.engine.angles.cache_folder", lambda: None)
    assert engine.resolve("V:kl=0.011").doses[0].theta > 0


# --- where they may be written


def test_effect_as_text():
    dose = parse_dose(" L2V : kl = 0.05 @1-2~gauss+held")
    assert str(dose) == "L2V:kl=0.05@1-2~gauss+held" and dose.is_open and dose.theta == Effect(0.05)
    assert parse_dose(str(dose)) == dose and Dose.from_dict(dose.to_dict()) == dose
    schedule = Schedule.parse("V:kl=0.05,A:0.1,sink=2,scale=2")
    assert str(schedule) == "V:kl=0.05,A:0.1,sink=2,scale=2" and schedule.is_open and not schedule.is_sober
    assert Schedule.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule
    assert Schedule.parse("V:kl=0").is_sober


def test_effect_in_files(tmp_path):
    schedule = Schedule.parse("V:kl=0.05@0.3..0.5,K:0.1")
    save_schedule(schedule, tmp_path / "a.toml")
    assert load_schedule(tmp_path / "a.toml") == schedule
    with pytest.raises(DrugError, match="its angle is found on a loaded model"):
        save_schedule(schedule, tmp_path / "a.csv", 4)
    (tmp_path / "b.csv").write_text("layer,site,theta\n0,V,kl=0.1\n")
    with pytest.raises(DrugError, match=r"line 2: theta 'kl=0.1' is no angle"):
        load_schedule(tmp_path / "b.csv")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("V:kl=", "kl is missing"),
        ("V:kl=x", "kl 'x' is not a number"),
        ("V:kl=-1", "kl must be at least 0"),
        ("V:kl=nan", "kl must be a finite number"),
        ("V:ld=0.1", "by its effect it is written kl=0.05"),
        ("V:kl=0.1/0.2", "is not a number"),
        ("kl=0.1", "there is no option 'kl'"),
    ],
)
def test_bad_effects(text, message):
    with pytest.raises(DrugError, match=message):
        Schedule.parse(text)


def test_open_doses_are_refused_where_no_model_is(engine):
    for use in (lambda s: s.table(3), lambda s: s.describe(3), engine.session().dose):
        with pytest.raises(DrugError, match="its angle is found on a loaded model: Engine.resolve"):
            use(Schedule.parse("V:kl=0.1"))


def test_every_way_in_resolves(engine):
    """Records, sessions and completions hold the angle; the generation is that of the angle."""
    angle = engine.resolve("V:kl=0.05,prompt=all")
    options = {"n": 8, "drug_seed": 3, "ignore_eos": True}
    done = engine.generate("Tell me of the sea", drug="V:kl=0.05,prompt=all", **options)
    plain = engine.generate("Tell me of the sea", drug=angle, **options)
    assert done.schedule == angle and not done.schedule.is_open and done.ids == plain.ids
    assert done.record.noise.schedule == angle and engine.replay(done.record).ids == done.ids
    assert engine.session("V:kl=0.05,prompt=all").schedule == angle
    ids = engine.encode("Tell me of the sea")
    np.testing.assert_array_equal(engine.forward(ids, "V:kl=0.05", 1), engine.forward(ids, str(angle), 1))
    several = engine.generate(prompts=["Tell me"] * 2, drug=["V:kl=0.05", "sober"], n=2)
    assert several[0].schedule.doses == angle.doses and several[1].schedule == SOBER


def test_command_takes_an_effect(engine, folder, tmp_path, capsys):
    (tmp_path / "drug.toml").write_text('[[dose]]\nsite = "V"\ntheta = "kl=0.05"\n')
    theta = engine.resolve("V:kl=0.05").doses[0].theta
    for flag, value in (("--drug", "V:kl=0.05"), ("--drug-file", str(tmp_path / "drug.toml"))):
        words = ["-m", str(folder), "-c", "128", "--cache-type", "f32", "-no-cnv", "-p", "The sea", "-n", "3"]
        assert main([*words, flag, value, "--show-schedule"]) == 0
        told = capsys.readouterr().err
        assert f"{theta:.4g}" in told and "kl=" not in told.partition("vectors moved")[2]


# --- the command


def test_meter_command(folder, tmp_path, capsys):
    out = tmp_path / "m"
    words = ["lab", "meter", "-m", str(folder), "-p", TEXT, "--piece", "64", "--tokens", "512"]
    assert (
        main(
            [*words, "--sites", "V,A", "--target-kl", "0.01", "--csv", f"{out}.csv", "--json", f"{out}.json"]
        )
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert "of target" in lines[0] and len(lines) == 3 and lines[1].startswith("V:")
    with open(f"{out}.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    data = json.loads((tmp_path / "m.json").read_text())
    assert [row["drug"] for row in rows] == data["record"]["settings"]["schedules"]
    for row, reading in zip(rows, data["readings"], strict=True):
        assert float(row["kl"]) == reading["kl"] and 0.5 < reading["kl"] / 0.01 < 2
        assert reading["found_kl"] == pytest.approx(0.01, rel=0.011) and reading["reached"]
    assert main([*words, "--drug", "V:0.1,A:0.2", "--drug", "K:0.3"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "drug",
        "V:0.1,A:0.2",
        "K:0.3",
    ]
    assert main([*words, "--drug", "V:0.1,sink=0"]) == 0
    assert "V:0.1,sink=0 " in capsys.readouterr().out, "what a text says of its sink holds"
    assert main([*words, "--sites", "V", "--by-layer", "2", "--theta", "10deg", "--laws", "gauss,sign"]) == 0
    assert [line.split()[0].partition("@")[2] for line in capsys.readouterr().out.splitlines()] == [
        "", "0-1~gauss", "1-2~gauss", "0-1~sign", "1-2~sign",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-p", ""], "the text is empty"),
        (["-p", "Hi"], "noise leaves the first 6 tokens alone"),
        (["-p", TEXT, "--theta", "0.1", "--target-kl", "1"], "give --theta or --target-kl"),
        (["-p", TEXT, "--drug", "V:0.1", "--target-kl", "1"], "drop --drug"),
        (["-p", TEXT, "--drug", "V:0.1", "--sites", "K"], "drop --drug"),
        (["-p", TEXT, "--drug", "V:0.1", "--laws", "sign"], "drop --drug"),
        (["-p", TEXT, "--theta", "x"], "--theta: theta 'x' is not a number"),
        (["-p", TEXT, "--seed", str(2**63)], "--seed: "),
        (["-p", TEXT, "-q", "-v"], "give --quiet or --verbose, not both"),
        (["-p", TEXT, "--by-layer", "4"], "a window of 4 layers does not fit this model of 3"),
        (["-p", TEXT, "--target-kl", "-1"], "kl must be at least 0"),
        (["-p", TEXT, "--target-kl", "nan"], "kl must be a finite number"),
        (["-p", "A short text", "--target-kl", "0.1"], "too short to hold a part of it back"),
        (["-p", TEXT, "--laws", "x"], "there is no such name 'x', only uniform"),
        (["-p", TEXT, "--drug", "V"], "theta is missing"),
        (["-p", TEXT, "--piece", "2"], "at least 8"),
    ],
)
def test_bad_words_are_one_line(folder, words, message, capsys):
    assert main(["lab", "meter", "-m", str(folder), *words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ") and message in lines[-1]


def test_ctrl_c_is_told(folder, tmp_path, monkeypatch, capsys):
    def stopped(engine, pieces, schedules, seed, progress):
        def stop(done, total, left):
            if done:
                raise KeyboardInterrupt

        return meter(engine, pieces, schedules, seed, stop)

    monkeypatch.setattr("tinydrug.cli.lab.meter.meter", stopped)
    words = ["lab", "meter", "-m", str(folder), "-p", TEXT, "--piece", "64", "--drug", "V:0.1"]
    assert main([*words, "--json", str(tmp_path / "m.json")]) == 130
    said, data = capsys.readouterr(), json.loads((tmp_path / "m.json").read_text())
    assert said.out.count("\n") == 2 and "ended by Ctrl-C" in said.err
    assert not data["record"]["complete"] and data["readings"][0]["tokens"] == 64 - 6


def test_without_scipy(folder, monkeypatch, capsys):
    monkeypatch.setattr("tinydrug.lab.page.find_spec", lambda name: None)
    assert main(["lab", "meter", "-m", str(folder), "-p", TEXT]) == 2
    assert "scipy is not installed: pip install 'tinydrug[lab]'" in capsys.readouterr().err
