"""The schedule: parsing, its table, its printed form (golden), and its files both ways."""

import dataclasses
import json
import tomllib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinydrug.errors import DrugError
from tinydrug.noise import SITES, SOBER, Dose, Layers, Profile, Schedule, load_schedule, save_schedule
from tinydrug.noise.files import read_csv, read_toml, write_csv, write_toml

deterministic = settings(derandomize=True, deadline=None)

GOLDEN = Path(__file__).parent / "golden"
EVERY_OPTION = "Q:0.01@3+5-7,pK:0.1@0.24:0/0.25:1/0.5:0/ceil,V:0.05@10-16,A:0.05@0.3..0.5,"
EVERY_OPTION += "sink=0,prompt=last,scale=0.5,seed=7"

# Parsing and value


@pytest.mark.parametrize(
    "specs",
    [
        "V:0.05,K:0.1",
        " k:0.1 , v:0.05 ",
        ["V:0.05", "K:0.1"],
        ("K:0.1,V:0.05",),
        iter(["V:0.05", Dose("K", 0.1)]),
    ],
)
def test_parses_commas_and_repeats_in_any_order(specs):
    schedule = Schedule.parse(specs)
    assert schedule == Schedule((Dose("K", 0.1), Dose("V", 0.05)))
    assert hash(schedule) == hash(Schedule((Dose("V", 0.05), Dose("K", 0.1))))
    assert str(schedule) == "K:0.1,V:0.05"


@pytest.mark.parametrize("specs", [None, (), "sober", ["Sober"], SOBER])
def test_sober(specs):
    assert Schedule.parse(specs) == SOBER == Schedule()
    assert SOBER.is_sober and str(SOBER) == "sober"
    assert not SOBER.table(3)["theta"].any()


def test_options_stand_in_the_text_and_given_ones_win():
    schedule = Schedule.parse(EVERY_OPTION)
    assert (schedule.sink, schedule.prompt, schedule.scale, schedule.seed) == (0, "last", 0.5, 7)
    assert Schedule.parse("V:1", seed=3, sink=0) == Schedule.parse("V:1,sink=0,seed=3")
    assert Schedule.parse("V:1,seed=7,sink=2", seed=8, sink=None).seed == 8
    assert Schedule.parse(schedule, prompt="all", seed=None) == dataclasses.replace(schedule, prompt="all")
    assert schedule.with_seed(9) == Schedule.parse(schedule, seed=9)
    assert schedule.with_seed(None).seed is None
    assert Schedule.parse("sober,sink=0") == Schedule(sink=0)


def test_is_sober():
    for text in ("sober", "V:0", "V:1,scale=0", "V:0/0,K:0@3", "V:1@0.5:0"):
        assert Schedule.parse(text).is_sober
        assert not Schedule.parse(text).table(4)["theta"].any()
    assert not Schedule.parse("V:0,K:0/0.1").is_sober


@pytest.mark.parametrize(
    "specs, message",
    [
        ("", "an empty drug: write SITE:THETA, for instance V:0.05"),
        ("V:1,", "an empty drug: write SITE:THETA, for instance V:0.05"),
        ("V:1,v:2", "site V is dosed twice, V:1 and V:2: keep one"),
        (["pK:1@3", "PK:1"], "site pK is dosed twice, pK:1@3 and pK:1: keep one"),
        ("V:1,foo=2", "there is no option 'foo', only sink, prompt, scale, seed"),
        ("V:1,sink=1,sink=2", "sink is given twice: keep one"),
        ("V:1,sink=", "sink '' is not a whole number of 0 or more"),
        ("V:1,sink=-1", "sink '-1' is not a whole number of 0 or more"),
        ("V:1,sink=9999999999", "sink must be a whole number from 0 to 2147483647, not 9999999999"),
        ("V:1,seed=1.5", "seed '1.5' is not a whole number of 0 or more"),
        (
            "V:1,seed=18446744073709551616",
            "seed must be a whole number from 0 to 18446744073709551615, not 18446744073709551616",
        ),
        ("V:1,scale=-1", "scale must be at least 0, not -1"),
        ("V:1,scale=nan", "scale must be a finite number, not nan"),
        ("V:1,prompt=some", "prompt must be none or last or all, not 'some'"),
        ("sober,V:1", "sober and V:1 contradict each other: keep one"),
        ([5], "a dose must be a Dose, not 5: Schedule.parse reads text"),
    ],
)
def test_bad_specs_are_refused_with_the_reason(specs, message):
    with pytest.raises(DrugError) as error:
        Schedule.parse(specs)
    assert str(error.value) == message


@pytest.mark.parametrize(
    "options, message",
    [
        ({"doses": "V:1"}, "a dose must be a Dose, not 'V': Schedule.parse reads text"),
        ({"sink": -1}, "sink must be a whole number from 0 to 2147483647, not -1"),
        ({"sink": 6.0}, "sink must be a whole number from 0 to 2147483647, not 6.0"),
        ({"sink": True}, "sink must be a whole number from 0 to 2147483647, not True"),
        ({"prompt": ["all"]}, "prompt must be none or last or all, not ['all']"),
        ({"scale": float("inf")}, "scale must be a finite number, not inf"),
        ({"scale": "1"}, "scale must be a finite number, not '1'"),
        ({"seed": -1}, "seed must be a whole number from 0 to 18446744073709551615, not -1"),
    ],
)
def test_bad_options_are_refused_with_the_reason(options, message):
    with pytest.raises(DrugError) as error:
        Schedule(**options)
    assert str(error.value) == message


# Table


def test_table_has_a_row_a_layer_and_a_column_a_site():
    table = Schedule.parse("H:0.1@0,A:0.2@1-2,scale=2").table(3)
    assert table.shape == (3, len(SITES))
    assert [site.code for site in SITES.values()] == list(range(len(SITES)))
    expected = np.zeros((3, len(SITES)))
    expected[0, SITES["H"].code] = 0.2
    expected[1:, SITES["A"].code] = 0.4
    np.testing.assert_array_equal(table["theta"], expected)
    assert not any(table[kind].any() for kind in ("law", "form", "angle"))


def test_table_carries_the_codes():
    table = Schedule.parse("NLKn:0.1~gauss,V:0.1").table(2)
    for layer in range(2):
        assert table[layer, SITES["K"].code].item() == (0.1, 1, 2, 1, 0, 0, 0, 0, 0)
        assert table[layer, SITES["V"].code].item() == (0.1, 0, 0, 0, 0, 0, 0, 0, 0)


def test_table_carries_what_becomes_of_a_dose_over_time():
    table = Schedule.parse("K:0.1~wander:32+cosine:200,M:0.1~gauss+held+tied,A:0.1~linear:9").table(1)
    assert table[0, SITES["K"].code].item() == (0.1, 0, 0, 0, 2, 32, 1, 200, 0)
    assert table[0, SITES["M"].code].item() == (0.1, 1, 0, 0, 1, 0, 0, 0, 1)
    assert table[0, SITES["A"].code].item() == (0.1, 0, 0, 0, 0, 0, 2, 9, 0)


@pytest.mark.parametrize(
    "text",
    ["V:0.1~held", "A:0.1@3~gauss+wander:32+tied", "L2Kn:0.2~linear:9", "M:0.05~sign+held+cosine:40+tied"],
)
def test_time_round_trips_through_every_form(text):
    schedule = Schedule.parse(text)
    assert str(schedule) == text
    assert Schedule.from_dict(schedule.to_dict()) == schedule
    assert read_toml(write_toml(schedule)) == schedule
    back = read_csv(write_csv(schedule, 4)).table(4)
    np.testing.assert_array_equal(back, schedule.table(4))


@pytest.mark.parametrize(
    "text, message",
    [
        ("V:0.1~wander", "wander needs its length in tokens: wander:200"),
        ("V:0.1~cosine:0", "cosine needs its length in tokens: cosine:200"),
        ("V:0.1~held:5", "tokens says nothing for renewal held"),
        ("V:0.1~held+fresh", "renewal is given twice: keep one"),
        (
            "V:0.1~gauss+sometimes",
            "there is no 'sometimes': over time there are fresh, held, wander, constant",
        ),
        ("V:0.1~wander:x", "tokens of wander 'x' is not a number"),
        ("V:0.1~linear:-3", "tokens of linear must be at least 0, not -3"),
    ],
)
def test_bad_times_are_refused_with_the_reason(text, message):
    with pytest.raises(DrugError) as error:
        Schedule.parse(text)
    assert str(error.value).startswith(f"drug {text!r}: {message}")


def test_table_refuses_what_the_model_lacks():
    with pytest.raises(
        DrugError, match="drug 'V:1@32': there is no layer 32: the model has 32 layers, 0 to 31"
    ):
        Schedule.parse("K:0.1,V:1@32").table(32)
    with pytest.raises(DrugError, match="drug 'V:1': theta grows beyond what a float32 holds"):
        Schedule.parse("V:1,scale=1e300").table(1)


# Printed form


@pytest.mark.parametrize(
    "name, text, n_layers",
    [
        ("schedule.txt", EVERY_OPTION, 32),
        ("schedule_slowfall.txt", f"V:0.1@0:1/{17 / 32}:1/{25 / 32}:0.2/{26 / 32}:0", 32),
        ("schedule_sober.txt", "V:0.1,scale=0", 12),
    ],
)
def test_printed_table(name, text, n_layers):
    assert Schedule.parse(text).describe(n_layers) + "\n" == (GOLDEN / name).read_text("utf-8")


def test_printed_table_fits_the_terminal(monkeypatch):
    text = ",".join(f"NL{site}n:0.123456789~gauss" for site in SITES) + ",scale=0.123456789"
    lines = Schedule.parse(text, sink=2**31 - 1, seed=2**64 - 1).describe(100).splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[2].split() == ["layer", *(f"NL{site}n~gauss" for site in SITES)]


# Round trips

angles = st.floats(0, 3)
points = st.lists(st.tuples(st.floats(-1, 2), st.floats(0, 1)), min_size=1, max_size=4)
profiles = st.builds(Profile, points, st.sampled_from(["interpolate", "ceil", "floor"]))
ranges = st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)).map(sorted).map(tuple), min_size=1)
doses = st.builds(
    Dose, st.sampled_from(list(SITES)), angles, st.none() | profiles | ranges.map(Layers)
) | st.builds(Dose, st.sampled_from(list(SITES)), st.lists(angles, min_size=1, max_size=12).map(tuple))
schedules = st.builds(
    Schedule,
    st.lists(doses, max_size=6, unique_by=lambda dose: dose.site),
    sink=st.integers(0, 2**31 - 1),
    prompt=st.sampled_from(["none", "last", "all"]),
    scale=st.floats(0, 10),
    seed=st.none() | st.integers(0, 2**64 - 1),
)


@deterministic
@given(schedules)
def test_text_dict_json_and_toml_round_trip(schedule):
    copies = [
        Schedule.parse(str(schedule)),
        Schedule.from_dict(schedule.to_dict()),
        Schedule.from_dict(json.loads(json.dumps(schedule.to_dict(), allow_nan=False))),
        read_toml(write_toml(schedule)),
    ]
    for copy in copies:
        assert copy == schedule
        assert hash(copy) == hash(schedule)


@deterministic
@given(schedules.map(lambda schedule: dataclasses.replace(schedule, sink=6, prompt="none", seed=None)))
def test_csv_round_trips_the_table(schedule):
    try:
        table = schedule.table(12)
    except DrugError as error:  # a profile that peaks between two layers
        assert "reaches no layer" in str(error)
        return
    np.testing.assert_array_equal(read_csv(write_csv(schedule, 12)).table(12), table)


def test_files_round_trip(tmp_path, caplog):
    schedule = Schedule.parse(EVERY_OPTION)
    save_schedule(schedule, tmp_path / "drug.toml")
    assert load_schedule(str(tmp_path / "drug.toml")) == schedule
    save_schedule(schedule, tmp_path / "drug.CSV", n_layers=32)
    assert caplog.messages == [
        "a CSV file holds the table alone, without sink, prompt, seed: save .toml to keep all"
    ]
    loaded = load_schedule(tmp_path / "drug.CSV")
    np.testing.assert_array_equal(loaded.table(32), schedule.table(32))
    assert (loaded.sink, loaded.prompt, loaded.scale, loaded.seed) == (6, "none", 1.0, None)


# TOML


def test_toml_reads_every_key():
    schedule = read_toml("""
        sink = 0
        prompt = "all"
        scale = 2
        seed = 18446744073709551615
        [[dose]]
        site = "v"
        theta = "3deg"
        layers = [9, 8, 20]
        law = "uniform"
        form = "Rotation"
        angle = "uniform"
        [[dose]]
        site = "K"
        theta = 0.1
        depth = "0.3..0.5"
        [[dose]]
        site = "H"
        theta = 1
        layers = 4
        [[dose]]
        site = "Q"
        theta = [0, 0.5]
        [[dose]]
        site = "A"
        theta = 0.2
        mode = "floor"
        profile = [{depth = 0.5, peakratio = 1}, {depth = 0, peakratio = 0}]
    """)
    assert schedule == Schedule.parse(
        "H:1@4,Q:0/0.5,K:0.1@0.3..0.5,V:3deg@8-9+20,A:0.2@0:0/0.5:1/floor,"
        "sink=0,prompt=all,scale=2,seed=18446744073709551615"
    )
    assert read_toml("") == SOBER


def test_toml_is_plain():
    assert tomllib.loads(write_toml(Schedule.parse("V:0.05@8-15,seed=7"))) == {
        "sink": 6,
        "prompt": "none",
        "scale": 1.0,
        "seed": 7,
        "dose": [
            {
                "site": "V",
                "theta": 0.05,
                "layers": "8-15",
                "law": "uniform",
                "form": "rotation",
                "angle": "uniform",
            }
        ],
    }


V = '[[dose]]\nsite = "V"\ntheta = 0.1\n'


@pytest.mark.parametrize(
    "text, message",
    [
        ("sink = 0\nscale = x\n", "is not TOML: Invalid value (at line 2, column 9)"),
        ("seed = " + "9" * 5000, "is not TOML: "),
        ("a = " + "[" * 100_000, "is not TOML: "),
        (
            "sinc = 0",
            "unknown key 'sinc': a schedule has sink, prompt, scale, seed, drift, diffusion and dose",
        ),
        ("sink = 0.5", "sink must be a whole number from 0 to 2147483647, not 0.5"),
        (
            "seed = 0x1" + "0" * 5000,
            "seed must be a whole number from 0 to 18446744073709551615, not that int",
        ),
        ("scale = '1'", "scale must be a finite number, not '1'"),
        ("prompt = 'first'", "prompt must be none or last or all, not 'first'"),
        ("[dose]\nsite = 'V'", "dose must be a list of tables: write [[dose]] above each"),
        ("dose = ['V:0.1']", "dose 1: must be a table, not 'V:0.1'"),
        (V + "[[dose]]\ntheta = 1", "dose 2: site is missing"),
        ("[[dose]]\nsite = 'V'", "dose 1: theta is missing"),
        (
            V + "thta = 1",
            "dose 1: unknown key 'thta': "
            "a dose has site, theta, layers, depth, profile, mode, law, form, angle",
        ),
        (V + V, "site V is dosed twice, V:0.1 and V:0.1: keep one"),
        ("[[dose]]\nsite = 'R'\ntheta = 1", "dose 1: noise never enters the residual stream"),
        ("[[dose]]\nsite = 'L2V'\ntheta = 1", "dose 1: there is no site 'L2V'; the sites are H"),
        ("[[dose]]\nsite = 'V'\ntheta = nan", "dose 1: theta must be a finite number, not nan"),
        ("[[dose]]\nsite = 'V'\ntheta = '3 degrees'", "dose 1: theta '3 degrees' is not a number"),
        (
            "[[dose]]\nsite = 'V'\ntheta = [1, 'x']",
            "dose 1: theta of layer 1 must be a finite number, not 'x'",
        ),
        (V + "law = 'cauchy'", "dose 1: there is no law 'cauchy', only uniform"),
        (V + "form = 2", "dose 1: there is no form 2, only rotation"),
        (V + "layers = '15-8'", "dose 1: layers: layers 15-8 run backwards: write 8-15"),
        (
            V + "layers = ['8', 9]",
            "dose 1: layers: a layer must be a whole number from 0 to 999999999, not '8'",
        ),
        (V + "layers = []", "dose 1: layers: the list of layers is empty"),
        (V + "layers = 1.5", "dose 1: layers: a layer must be a whole number from 0 to 999999999, not 1.5"),
        (V + "depth = 0.5", "dose 1: depth: must be text such as '0.3..0.5', not 0.5"),
        (V + "depth = '0.5'", "dose 1: depth: depth is missing"),
        (V + "layers = 1\ndepth = '0..1'", "dose 1: layers and depth are both given: keep one"),
        (V + "mode = 'ceil'", "dose 1: mode is given without the profile it belongs to"),
        (V + "profile = 1", "dose 1: profile: must be a list of {depth, peakratio}, not 1"),
        (V + "profile = []", "dose 1: profile: a profile needs at least one point"),
        (
            V + "profile = [{depth = 0, peakratio = 1, x = 2}]",
            "dose 1: profile: point 1: must be {depth, peakratio}, not {'depth': 0, 'peakratio': 1, 'x': 2}",
        ),
        (
            V + "profile = [{depth = 0, peakratio = 1}]\nmode = 'ceiling'",
            "dose 1: profile: there is no mode 'ceiling', only interpolate, ceil, floor",
        ),
    ],
)
def test_bad_toml_is_refused_with_file_and_key(tmp_path, text, message):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(DrugError) as error:
        load_schedule(path)
    assert str(error.value).startswith(f"{path}: {message}")
    assert "\n" not in str(error.value)


# CSV


def test_csv_reads_sparse_rows_any_column_order_and_spreadsheet_marks(tmp_path):
    path = tmp_path / "drug.csv"
    path.write_bytes(
        "\ufeffsite, theta ,Layer,law\r\nv,0.1,2,\r\n\r\nV,3deg,0,uniform\r\nK,0,1,\r\n".encode()
    )
    assert load_schedule(path) == Schedule.parse("V:3deg/0/0.1,K:0/0/0")
    assert read_csv("layer,site,theta\n") == SOBER


def test_csv_is_plain():
    assert write_csv(Schedule.parse("V:0.1@1,K:0.2,scale=0.5"), 2) == (
        "layer,site,theta,law,form,angle,time\n"
        "0,K,0.1,uniform,rotation,uniform,\n"
        "0,V,0.0,uniform,rotation,uniform,\n"
        "1,K,0.1,uniform,rotation,uniform,\n"
        "1,V,0.05,uniform,rotation,uniform,\n"
    )


HEADER = "layer,site,theta\n"


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "is empty: its first line should be layer,site,theta"),
        ("\n0,V,0.1", "line 2: the header should be layer,site,theta[,law,form,angle,time], not '0,V,0.1'"),
        (
            "layer;site;theta",
            "line 1: the header should be layer,site,theta[,law,form,angle,time], not 'layer;site;theta'",
        ),
        (
            "layer,site",
            "line 1: the header should be layer,site,theta[,law,form,angle,time], not 'layer,site'",
        ),
        (
            HEADER.strip() + ",dose",
            "line 1: the header should be layer,site,theta[,law,form,angle,time], not",
        ),
        (
            HEADER.strip() + ",site",
            "line 1: the header should be layer,site,theta[,law,form,angle,time], not",
        ),
        (HEADER + "0,V", "line 2: has 2 cells, the header has 3"),
        (HEADER + "0,V,0.1,\n", "line 2: has 4 cells, the header has 3"),
        (HEADER + "0,V,0.1\n-1,V,0.1", "line 3: layer '-1' is not a whole number from 0 to 9999"),
        (HEADER + "10000,V,0.1", "line 2: layer '10000' is not a whole number from 0 to 9999"),
        (HEADER + "1e1,V,0.1", "line 2: layer '1e1' is not a whole number from 0 to 9999"),
        (HEADER + "0,X,0.1", "line 2: there is no site 'X'; the sites are H"),
        (HEADER + "0,R,0.1", "line 2: noise never enters the residual stream"),
        (HEADER + "0,V,nan", "line 2: theta must be a finite number, not nan"),
        (HEADER + "0,V,-1", "line 2: theta must be at least 0, not -1"),
        (HEADER + "0,V,", "line 2: theta is missing"),
        (HEADER + "0,V,1/2", "line 2: theta '1/2' is more than one angle"),
        (HEADER + "0,V,1\n0,v,1", "line 3: layer 0 of site V is given twice"),
        (HEADER + '0,"V,1', "line 2: is not CSV: unexpected end of data"),
        ("layer,site,theta,law\n0,V,1,cauchy", "line 2: there is no law 'cauchy', only uniform"),
    ],
)
def test_bad_csv_is_refused_with_file_and_line(tmp_path, text, message):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(DrugError) as error:
        load_schedule(path)
    assert str(error.value).startswith(f"{path}: {message}")
    assert "\n" not in str(error.value)


def test_csv_has_one_law_a_site():
    text = "layer,site,theta,law\n0,V,1,gauss\n0,K,1,\n1,V,1,{}\n"
    assert read_csv(text.format("gauss")) == Schedule.parse("V:1/1~gauss,K:1/0")
    with pytest.raises(
        DrugError, match="line 4: law, form, angle, time of site V differ from an earlier line"
    ):
        read_csv(text.format("uniform"))


@deterministic
@given(st.text(alphabet="layersithdo,=[]{}\"'\n0123456789.VKQ", max_size=60) | st.text(max_size=30))
def test_any_file_text_is_a_schedule_or_a_drug_error(text):
    for read in (read_toml, read_csv):
        try:
            read(text)
        except DrugError as error:
            assert "\n" not in str(error)


# Files


def test_unreadable_and_unwritable_files_are_refused(tmp_path):
    (tmp_path / "folder.toml").mkdir()
    (tmp_path / "latin.toml").write_bytes(b"# \xe9")
    for name, message in {
        "none.toml": "cannot be read: No such file",
        "folder.toml": "cannot be read: ",
        "latin.toml": "is not UTF-8 text",
        "drug.json": "a drug file ends in .toml or .csv",
        "drug": "a drug file ends in .toml or .csv",
    }.items():
        with pytest.raises(DrugError) as error:
            load_schedule(tmp_path / name)
        assert str(error.value).startswith(f"{tmp_path / name}: {message}")
    for name, message in {
        "none/drug.toml": "cannot be written: No such file",
        "drug.csv": "a CSV table needs the number of layers",
        "drug.yaml": "a drug file ends in .toml or .csv",
    }.items():
        with pytest.raises(DrugError) as error:
            save_schedule(SOBER, tmp_path / name)
        assert str(error.value).startswith(f"{tmp_path / name}: {message}")
