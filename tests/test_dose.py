"""One dose: its grammar, its profile over depth against DRµGS' own formula, and every way to get it wrong."""

import logging
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinydrug.errors import DrugError
from tinydrug.noise import SITES, Depth, Dose, Layers, Profile, parse_dose
from tinydrug.noise.laws import ANGLES, FORMS, LAWS, Choice

deterministic = settings(derandomize=True, deadline=None)


@pytest.mark.parametrize(
    "text, dose",
    [
        ("V:0.05", Dose("V", 0.05)),
        (" v : .05 ", Dose("V", 0.05)),
        ("PK:3deg", Dose("pK", math.radians(3))),
        ("pk:180deg", Dose("pK", math.pi)),
        ("H:0", Dose("H", 0.0)),
        ("H:-0", Dose("H", 0.0)),
        ("A:1e-3@8-15", Dose("A", 1e-3, Layers(((8, 15),)))),
        ("A:1@8", Dose("A", 1.0, Layers(((8, 8),)))),
        ("A:1@20+8-9+10-12+9", Dose("A", 1.0, Layers(((8, 12), (20, 20))))),
        ("K:0.1@0.3..0.5", Dose("K", 0.1, Depth(0.3, 0.5))),
        ("K:0.1@.3...5", Dose("K", 0.1, Depth(0.3, 0.5))),
        ("K:0.1@0..1", Dose("K", 0.1, Depth(0, 1))),
        ("K:0.1@0.5:1/0.2:0/ceil", Dose("K", 0.1, Profile(((0.2, 0), (0.5, 1)), "ceil"))),
        ("K:0.1@-1:1", Dose("K", 0.1, Profile(((-1, 1),)))),
        ("Q:0/0.1/3deg", Dose("Q", (0.0, 0.1, math.radians(3)))),
        ("Q:0.1/", Dose("Q", (0.1,))),
        ("Q:0.1~Uniform", Dose("Q", 0.1, law="uniform")),
        ("Q:0.1@3~uniform", Dose("Q", 0.1, Layers(((3, 3),)), "uniform", "rotation", "uniform")),
    ],
)
def test_parses(text, dose):
    assert parse_dose(text) == dose
    assert hash(parse_dose(text)) == hash(dose)


def test_text_is_short_and_canonical():
    texts = ["V:0.05", "pK:1@8-12+20", "A:0.1@0.3..0.5", "K:1e-07@-1:1/0.5:0.25/floor", "Q:0/0.1", "H:2/"]
    assert [str(parse_dose(text.lower())) for text in texts] == texts


angles = st.floats(0, 3) | st.integers(0, 3)
ratios = st.floats(0, 1e6)
modes = st.sampled_from(["interpolate", "ceil", "floor"])
wheres = st.one_of(
    st.none(),
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)).map(sorted).map(tuple), min_size=1).map(
        Layers
    ),
    st.lists(st.floats(0, 1), min_size=2, max_size=2).map(lambda ends: Depth(*sorted(ends))),
    st.builds(Profile, st.lists(st.tuples(st.floats(-2, 2), ratios), min_size=1, max_size=5), modes),
)
doses = st.builds(Dose, st.sampled_from(list(SITES)), angles, wheres) | st.builds(
    Dose, st.sampled_from(list(SITES)), st.lists(angles, min_size=1, max_size=9).map(tuple)
)


@deterministic
@given(doses)
def test_round_trips(dose):
    for again in (parse_dose(str(dose)), Dose.from_dict(dose.to_dict())):
        assert again == dose
        assert hash(again) == hash(dose)
        assert str(again) == str(dose)


@deterministic
@given(st.text(alphabet="HQpKVAn:@~./+-0123456789edgrinf LNul", max_size=24) | st.text(max_size=24))
def test_any_text_is_a_dose_or_a_drug_error(text):
    try:
        dose = parse_dose(text)
    except DrugError as error:
        assert "\n" not in str(error)
    else:
        assert parse_dose(str(dose)) == dose


SITES_LISTED = (
    "the sites are H (normed block input, before q, k, v); Q (query heads, before RoPE); "
    "pK (new key heads, before RoPE and cache); K (cached key heads, at each read, after RoPE); "
    "V (cached value heads, at each read); A (attention output heads, before o_proj); "
    "M (MLP activations, before down_proj)"
)
RESIDUAL = (
    "noise never enters the residual stream: it would stay in the sum that every later layer reads; "
    "dose H, the normed copy of it that a block reads"
)
FORMS_LISTED = (
    "rotation (no mark: turned by the angle phi, the norm kept), "
    "L2 (L2: x + phi |x| r/|r|, the norm not kept), "
    "NL (NL: x + phi |x| o/|o| scaled back to |x|: turned by arctan(phi))"
)
ANGLES_LISTED = "uniform (no mark: phi is U[0, theta)), normal (n: phi is |N(0, theta)|)"
SYNTAX = (
    "write layers as 8, 8-15 or 8-9+20, a depth as 0.3..0.5, a profile as 0.3:0/0.4:1/0.5:0, "
    "or a preset: readme, samples, slowfall, single:8, stack:8"
)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "an empty drug: write SITE:THETA, for instance V:0.05"),
        ("  ", "an empty drug: write SITE:THETA, for instance V:0.05"),
        ("X:0.1", f"drug 'X:0.1': there is no site 'X'; {SITES_LISTED}"),
        ("valium:0.1", f"drug 'valium:0.1': there is no site 'valium'; {SITES_LISTED}"),
        (":0.1", f"drug ':0.1': there is no site ''; {SITES_LISTED}"),
        ("0.1", f"drug '0.1': there is no site '0.1'; {SITES_LISTED}"),
        ("R:0.1", f"drug 'R:0.1': {RESIDUAL}"),
        ("resid:0.1", f"drug 'resid:0.1': {RESIDUAL}"),
        ("Residual:0.1", f"drug 'Residual:0.1': {RESIDUAL}"),
        ("L3V:0.1", f"drug 'L3V:0.1': there is no form 'L3' before site V, only {FORMS_LISTED}"),
        ("Vx:0.1", f"drug 'Vx:0.1': there is no angle 'x' after site V, only {ANGLES_LISTED}"),
        ("V:0.1~cauchy", "drug 'V:0.1~cauchy': there is no law 'cauchy', only uniform, gauss, sign"),
        ("V:0.1~", "drug 'V:0.1~': there is no law '', only uniform, gauss, sign"),
        ("V:0.1~uniform~x", "drug 'V:0.1~uniform~x': there is no law 'uniform~x', only uniform, gauss, sign"),
        ("V", "drug 'V': theta is missing: write SITE:THETA, for instance V:0.05"),
        ("V:", "drug 'V:': theta is missing"),
        ("V:deg", "drug 'V:deg': theta is missing"),
        ("V:@3", "drug 'V:@3': theta is missing"),
        ("V:/", "drug 'V:/': theta is missing"),
        ("V:0.1//0.2", "drug 'V:0.1//0.2': theta is missing"),
        ("V:nan", "drug 'V:nan': theta must be a finite number, not nan"),
        ("V:nandeg", "drug 'V:nandeg': theta must be a finite number, not nan"),
        ("V:-inf", "drug 'V:-inf': theta must be a finite number, not -inf"),
        ("V:1e999", "drug 'V:1e999': theta must be a finite number, not inf"),
        ("V:-0.1", "drug 'V:-0.1': theta must be at least 0, not -0.1"),
        ("V:-3deg", "drug 'V:-3deg': theta must be at least 0, not -3"),
        ("V:0.1junk", "drug 'V:0.1junk': theta '0.1junk' is not a number"),
        ("V:1_0", "drug 'V:1_0': theta '1_0' is not a number"),
        ("V:٣", "drug 'V:٣': theta '٣' is not a number"),
        ("V:0,1", "drug 'V:0,1': theta '0,1' is not a number"),
        ("V:0.1@", f"drug 'V:0.1@': cannot read '': {SYNTAX}"),
        ("V:0.1@x", f"drug 'V:0.1@x': cannot read 'x': {SYNTAX}"),
        ("V:0.1@8-", f"drug 'V:0.1@8-': cannot read '8-': {SYNTAX}"),
        ("V:0.1@8-15junk", f"drug 'V:0.1@8-15junk': cannot read '8-15junk': {SYNTAX}"),
        ("V:0.1@8@9", f"drug 'V:0.1@8@9': cannot read '8@9': {SYNTAX}"),
        ("V:0.1@0.4", f"drug 'V:0.1@0.4': cannot read '0.4': {SYNTAX}"),
        ("V:0.1@9-3", "drug 'V:0.1@9-3': layers 9-3 run backwards: write 3-9"),
        ("V:0.1@-3", "drug 'V:0.1@-3': a layer must be a whole number from 0 to 999999999, not -3"),
        ("V:0.1@1--3", "drug 'V:0.1@1--3': a layer must be a whole number from 0 to 999999999, not -3"),
        ("V:0.1@0.5..0.3", "drug 'V:0.1@0.5..0.3': depth 0.5..0.3 runs backwards: write 0.3..0.5"),
        ("V:0.1@-0.5..0.3", "drug 'V:0.1@-0.5..0.3': depth must be at least 0, not -0.5"),
        ("V:0.1@0.5..1.5", "drug 'V:0.1@0.5..1.5': depth goes from 0, the first layer, to 1, not to 1.5"),
        ("V:0.1@0.5..", "drug 'V:0.1@0.5..': depth is missing"),
        ("V:0.1@0.1..nan", "drug 'V:0.1@0.1..nan': depth must be a finite number, not nan"),
        ("V:0.1@0.1..0.2..0.3", "drug 'V:0.1@0.1..0.2..0.3': depth '0.2..0.3' is not a number"),
        ("V:0.1@0.1:1/cel", "drug 'V:0.1@0.1:1/cel': there is no mode 'cel', only interpolate, ceil, floor"),
        ("V:0.1@0.1:x", "drug 'V:0.1@0.1:x': peakratio 'x' is not a number"),
        ("V:0.1@0.1:-1", "drug 'V:0.1@0.1:-1': point 1: peakratio must be at least 0, not -1"),
        ("V:0.1@0.1:1//0.2:1", "drug 'V:0.1@0.1:1//0.2:1': depth is missing"),
        (
            "V:0.1/0.2@3",
            "drug 'V:0.1/0.2@3': one theta a layer already says where: drop the layers, depth or profile",
        ),
    ],
)
def test_bad_text_is_refused_with_the_reason(text, message):
    with pytest.raises(DrugError) as error:
        parse_dose(text)
    assert str(error.value) == message


def test_a_long_bad_text_gives_a_short_message():
    with pytest.raises(DrugError) as error:
        parse_dose("V:" + "9" * 100_000 + "x")
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"site": 5}, "there is no site 5"),
        ({"site": "R"}, "noise never enters the residual stream"),
        ({"theta": "0.1"}, "theta must be a finite number, not '0.1'"),
        ({"theta": True}, "theta must be a finite number, not True"),
        ({"theta": 10**400}, "theta must be a finite number, not 1000"),
        ({"theta": 10**5000}, "theta must be a finite number, not that int"),
        ({"theta": ()}, "theta is an empty list"),
        ({"theta": (0.1, -1)}, "theta of layer 1 must be at least 0, not -1"),
        ({"where": "8-15"}, "where must be Layers, Depth or Profile, not '8-15'"),
        ({"law": "cauchy"}, "there is no law 'cauchy', only uniform, gauss, sign"),
        ({"form": "L3"}, "there is no form 'L3', only rotation"),
        ({"angle": None}, "there is no angle None, only uniform"),
    ],
)
def test_bad_values_are_refused_with_the_reason(fields, message):
    with pytest.raises(DrugError) as error:
        Dose(**{"site": "V", "theta": 0.1, **fields})
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Layers(()), "the list of layers is empty"),
        (lambda: Layers((8, 15)), "layers are (first, last) pairs, not 8"),
        (lambda: Layers(((1.0, 2),)), "a layer must be a whole number from 0 to 999999999, not 1.0"),
        (lambda: Profile(()), "a profile needs at least one point"),
        (lambda: Profile((0.5,)), "point 1: must be {depth, peakratio}, not 0.5"),
        (lambda: Profile(({"depth": 1},)), "point 1: must be {depth, peakratio}, not {'depth': 1}"),
        (lambda: Profile(((0, 1), (math.nan, 1))), "point 2: depth must be a finite number, not nan"),
        (lambda: Profile(((0, 1),), "Ceiling"), "there is no mode 'Ceiling', only interpolate, ceil, floor"),
    ],
)
def test_bad_wheres_are_refused_with_the_reason(make, message):
    with pytest.raises(DrugError) as error:
        make()
    assert str(error.value) == message


def test_above_pi_is_warned_not_refused(caplog):
    with caplog.at_level(logging.WARNING, "tinydrug"):
        assert parse_dose("V:180deg").theta == math.pi
        assert not caplog.records
        assert parse_dose("V:4").theta == 4
        assert parse_dose("A:1@0.5:5").theta == 1
    assert [record.getMessage() for record in caplog.records] == [
        "drug V: 4 rad is above pi, half a turn",
        "drug A: 5 rad is above pi, half a turn",
    ]


def test_a_new_law_form_and_angle_is_one_line_each(monkeypatch):
    monkeypatch.setitem(LAWS, "cauchy", Choice(101, "~cauchy", ""))
    monkeypatch.setitem(FORMS, "L3", Choice(101, "L3", ""))
    monkeypatch.setitem(ANGLES, "cubic", Choice(101, "c", ""))
    dose = parse_dose("l3pkC:0.1@3~CAUCHY")
    assert (dose.site, dose.law, dose.form, dose.angle) == ("pK", "cauchy", "L3", "cubic")
    assert str(dose) == "L3pKc:0.1@3~cauchy"
    assert Dose.from_dict(dose.to_dict()) == parse_dose(str(dose)) == dose


def test_thetas_of_each_kind_of_where():
    for text, thetas in {
        "V:0.5": [0.5, 0.5, 0.5, 0.5],
        "V:0.5@1-2": [0, 0.5, 0.5, 0],
        "V:0.5@0+3": [0.5, 0, 0, 0.5],
        "V:0.5@0.25..0.5": [0, 0.5, 0.5, 0],
        "V:0.5@0:0/1:1": [0, 0.125, 0.25, 0.375],
        "V:0.5/0/0.25": [0.5, 0, 0.25, 0],
    }.items():
        np.testing.assert_array_equal(parse_dose(text).thetas(4), thetas)


def test_a_tenth_of_depth_is_the_layer_it_names():
    for layer in range(10):
        ratios = parse_dose(f"V:1@0.{layer}..0.{layer}").thetas(10)
        np.testing.assert_array_equal(np.flatnonzero(ratios), [layer])


@pytest.mark.parametrize(
    "text, message",
    [
        ("V:0.1@8-12", "drug 'V:0.1@8-12': there is no layer 12: the model has 12 layers, 0 to 11"),
        (
            "V:0/0" + "/0.1" * 11,
            "drug 'V:0/0" + "/0.1" * 11 + "': gives theta of 13 layers, the model has 12",
        ),
        (
            "V:0.1@0.26..0.3",
            "drug 'V:0.1@0.26..0.3': reaches no layer: layer l of this model lies at depth l/12",
        ),
        ("V:0.1@1..1", "drug 'V:0.1@1..1': reaches no layer: layer l of this model lies at depth l/12"),
        (
            "V:0.1@0.26:0/0.27:1/0.3:0",
            "drug 'V:0.1@0.26:0/0.27:1/0.3:0': reaches no layer: layer l of this model lies at depth l/12",
        ),
        (
            "V:1e300@0:1e300",
            "drug 'V:1e+300@0:1e+300': theta grows beyond what a float32 holds: lower it or the scale",
        ),
        ("V:1e39", "drug 'V:1e+39': theta grows beyond what a float32 holds: lower it or the scale"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(text, message):
    with pytest.raises(DrugError) as error:
        parse_dose(text).thetas(12)
    assert str(error.value) == message


# Profiles: seeds.md 1.5, the published settings and DRµGS' own formula.


def hump(centre: float, spread: float, mode: str) -> Profile:
    """The four-point profile of DRµGS' README."""
    c, s = centre, spread
    return Profile(((c - 1.01 * s, 0), (c - s, 1), (c + s, 1), (c + 1.01 * s, 0)), mode)


@pytest.mark.parametrize("mode", ["interpolate", "ceil", "floor"])
@pytest.mark.parametrize(
    "centre, spread, n_layers, first, last",
    [
        (0.4, 0.1, 32, 10, 16),
        (0.4, 5 / 32, 32, 8, 17),
        (0.4, 5 / 32, 60, 15, 33),
        (0.4, 5 / 32, 24, 6, 13),
        (0.4, 5 / 32, 12, 3, 6),
        (0.4, 0.1, 22, 7, 11),
        (0.2, 1 / 32, 32, 6, 7),
    ],
)
def test_published_humps(centre, spread, n_layers, first, last, mode):
    expected = np.zeros(n_layers)
    expected[first : last + 1] = 1
    np.testing.assert_array_equal(hump(centre, spread, mode).ratios(n_layers), expected)


def test_published_slopes():
    slowfall = Profile(((0, 1), (17 / 32, 1), (25 / 32, 0.2), (26 / 32, 0)))
    expected = [1] * 18 + [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2] + [0] * 6
    np.testing.assert_allclose(slowfall.ratios(32), expected, atol=1e-12)
    notebook = Profile(((0, 0.8), (4 / 32, 1), (7 / 32, 0)))
    expected = [0.8, 0.85, 0.9, 0.95, 1, 2 / 3, 1 / 3] + [0] * 25
    np.testing.assert_allclose(notebook.ratios(32), expected, atol=1e-12)


@pytest.mark.parametrize("layer", [2, 16, 30])
def test_published_windows(layer):
    window = Profile(
        (
            ((layer - 1.1) / 32, 0),
            ((layer - 1) / 32, 1),
            ((layer + 1) / 32, 1),
            ((layer + 1.1) / 32, 0),
        ),
        "ceil",
    )
    np.testing.assert_array_equal(np.flatnonzero(window.ratios(32)), [layer - 1, layer, layer + 1])
    full_stack = Profile(((-1, 1), ((layer + 1.1) / 32, 0)), "ceil")
    np.testing.assert_array_equal(np.flatnonzero(full_stack.ratios(32)), np.arange(min(layer + 2, 32)))


def drugs_bioavailability(idx: int, total_layers: int, shape: list[dict], mode: str) -> float:
    """The formula of DRµGS, `get_tissue_bioavailability`, statement by statement."""
    layer_depth = idx / total_layers
    shaper = sorted(shape, key=lambda x: x["depth"])
    av1, av2, search = shaper[0], shaper[-1], True
    if layer_depth <= av1["depth"]:
        av2, search = av1, False
    if layer_depth >= av2["depth"]:
        av1, search = av2, False
    if search:
        for d1, d2 in zip(shaper, shaper[1:], strict=False):
            if d1["depth"] <= layer_depth and d2["depth"] >= layer_depth:
                av1, av2 = d1, d2
                break
    if mode == "ceil" or av1["depth"] == av2["depth"]:
        return max(av1["peakratio"], av2["peakratio"])
    if mode == "floor":
        return min(av1["peakratio"], av2["peakratio"])
    ldr = (layer_depth - av1["depth"]) / (av2["depth"] - av1["depth"])
    return (ldr * (av2["peakratio"] - av1["peakratio"])) + av1["peakratio"]


depths = st.floats(-2, 2) | st.sampled_from([-1, 0, 0.25, 0.5, 0.75, 1])  # the second hits layers and repeats
shapes = st.lists(st.fixed_dictionaries({"depth": depths, "peakratio": ratios}), min_size=1, max_size=6)


@deterministic
@given(shapes, modes, st.integers(1, 40))
def test_profile_is_the_formula_of_drugs(shape, mode, n_layers):
    expected = [drugs_bioavailability(i, n_layers, shape, mode) for i in range(n_layers)]
    np.testing.assert_array_equal(Profile(shape, mode).ratios(n_layers), expected)


@pytest.mark.parametrize(
    "preset, n_layers, dosed",
    [  # the worked tables of the original's notes
        ("readme", 32, range(10, 17)),
        ("readme", 22, range(7, 12)),
        ("samples", 32, range(8, 18)),
        ("samples", 60, range(15, 34)),
        ("single:8", 32, range(7, 10)),
        ("stack:8", 32, range(0, 10)),
    ],
)
def test_presets_dose_the_published_layers(preset, n_layers, dosed):
    dose = parse_dose(f"V:0.1@{preset}")
    assert np.flatnonzero(dose.thetas(n_layers)).tolist() == list(dosed)
    assert parse_dose(str(dose)) == dose


def test_slowfall_falls_slowly():
    thetas = parse_dose("V:1@slowfall").thetas(32)
    np.testing.assert_allclose(thetas[:18], 1)
    np.testing.assert_allclose(thetas[18:26], [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2])
    np.testing.assert_allclose(thetas[26:], 0)
