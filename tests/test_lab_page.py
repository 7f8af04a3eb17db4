"""Pages that need nothing but themselves: their markup, their data, and how they work in a real browser."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import tiny
from engines import add_tokenizer

import tinydrug
from tinydrug.errors import ConfigError
from tinydrug.lab.doubt import doubt
from tinydrug.lab.doubt_page import doubt_page
from tinydrug.lab.page import page
from tinydrug.lab.progress import Work, spoken
from tinydrug.lab.results import to_json, write_csv, write_json, write_npz
from tinydrug.lab.vergence import Plan, vergence
from tinydrug.lab.vergence_page import vergence_page

NASTY = "</script><script>alert(1)</script><!-- \u2028 & \" '"
FETCHES = {"src", "href", "action", "data", "poster", "srcset"}  # attributes


class Markup(HTMLParser):
    """What a page is made of: attributes that fetch, elements by name, the text of its data."""

    def __init__(self, text: str):
        super().__init__()
        self.fetched, self.names, self.data, self._inside = [], [], "", False
        self.feed(text)

    def handle_starttag(self, name, attributes):
        self.names.append(name)
        self.fetched += [value for key, value in attributes if key in FETCHES]
        self._inside = dict(attributes).get("id") == "data"

    def handle_endtag(self, name):
        self._inside = False

    def handle_data(self, text):
        self.data += text if self._inside else ""


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = add_tokenizer(tiny.build("llama-gqa", tmp_path_factory.mktemp("page") / "gqa"))
    with tinydrug.load(folder, ctx=128, cache="f32") as engine:
        yield engine


@pytest.fixture(scope="module")
def pages(engine, tmp_path_factory):
    root = tmp_path_factory.mktemp("pages")
    plan = Plan(sites=("V", "A"), doses=(0.3, 0.9), width=1, seeds=(1, 2))
    made = {
        "vergence": vergence_page(vergence(engine, f"Tell me of the sea {NASTY}", plan)),
        "doubt": doubt_page(doubt(engine, "Tell me of the sea", "A:0.9", 4, 8), NASTY),
    }
    for name, text in made.items():
        (root / f"{name}.html").write_text(text, "utf-8")
    return {name: root / f"{name}.html" for name in made}


# --- markup


def test_nothing_is_fetched(pages):
    for path in pages.values():
        text = path.read_text("utf-8")
        markup = Markup(text)
        assert set(markup.fetched) <= {"data:,"}, markup.fetched
        assert "default-src 'none'" in text and "connect-src" not in text
        assert "link" not in [name for name in markup.names if name != "link"]
        json.loads(markup.data)


def test_data_cannot_leave_its_element():
    text = page("T<b>", "<p></p>", "", {"a": NASTY, NASTY: [1.5, float("nan")]})
    markup = Markup(text)
    assert markup.names.count("script") == 3 and "alert" not in "".join(re.findall(r"<script>[^<]*", text))
    assert json.loads(markup.data) == {"a": NASTY, NASTY: [1.5, None]}
    assert "<title>T&lt;b&gt;</title>" in text


def test_missing_plotly_is_one_line(monkeypatch):
    monkeypatch.setattr("tinydrug.lab.page.find_spec", lambda name: None)
    page("t", "", "", {})
    with pytest.raises(ConfigError, match=r"^plotly is not installed: pip install 'tinydrug\[lab\]'$"):
        page("t", "", "", {}, plotly=True)


# --- in a browser, where there is one


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """browser(url) -> the page's elements after its scripts have run, and what it said on its console."""
    command = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if command is None:
        pytest.skip("no Chromium on this machine")
    profile = tmp_path_factory.mktemp("profile")

    def visit(path, place="", size="1280,1000"):
        words = ["--headless=new", "--no-sandbox", "--disable-gpu", "--enable-unsafe-swiftshader"]
        words += ["--use-angle=swiftshader", "--virtual-time-budget=8000", f"--window-size={size}"]
        words += [f"--user-data-dir={profile}", "--enable-logging=stderr", "--dump-dom"]
        done = subprocess.run(
            [command, *words, f"{path.as_uri()}{place}"], capture_output=True, text=True, timeout=120
        )
        return done.stdout, re.findall(r"CONSOLE.*?\] (.*)", done.stderr)

    return visit


def test_vergence_page_works(pages, browser):
    text, said = browser(pages["vergence"], "#A,2,2")
    assert not [line for line in said if "rror" in line or "Refused" in line], said
    assert "layers 2–2" in text and "0.9 rad" in text
    assert "gl-container" in text and text.count('class="nsewdrag') >= 1  # the surface, and the map below it
    rows = text.partition('id="tokens"')[2].partition("</table>")[0]
    assert rows.count("<tr>") == 11 and re.search(r'class="(common|excess|shortfall)"', rows)
    sober, _ = browser(pages["vergence"], "#V,0,0")
    assert "layers 0–0" in sober and "0 rad" in sober
    rows = sober.partition('id="tokens"')[2].partition("</table>")[0]
    assert 'class="common"' in rows and "excess" not in rows and "shortfall" not in rows


def test_doubt_page_works(pages, browser):
    text, said = browser(pages["doubt"], size="400,800")
    assert not [line for line in said if "rror" in line or "Refused" in line], said
    assert text.partition('id="text"')[2].partition("</p>")[0].count('tabindex="0"') == 8
    assert "color-mix" in text and "4 passes, entropy of their answers" in text
    assert "<script>alert(1)" not in text


# --- files of results


def test_files_say_what_is_unknown(tmp_path):
    rows = [{"a": np.float32(0.5), "b": float("nan"), "c": "x,y"}, {"a": 1, "b": float("inf"), "c": None}]
    write_csv(tmp_path / "a.csv", rows)
    assert (tmp_path / "a.csv").read_text() == 'a,b,c\n0.5,,"x,y"\n1,,\n'
    write_json(tmp_path / "a.json", {"rows": rows, "x": np.arange(3), 5: (np.int64(2), tmp_path)})
    data = json.loads((tmp_path / "a.json").read_text())
    assert data["rows"][0] == {"a": 0.5, "b": None, "c": "x,y"} and data["x"] == [0, 1, 2]
    assert data["5"] == [2, str(tmp_path)]
    write_npz(tmp_path / "a.npz", {"z": np.eye(2)}, {"n": float("nan")})
    with np.load(tmp_path / "a.npz") as arrays:
        assert arrays["z"].tolist() == [[1, 0], [0, 1]] and json.loads(str(arrays["record"])) == {"n": None}


def test_files_appear_whole_or_not_at_all(tmp_path):
    write_json(tmp_path / "a.json", [1])
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", object())
    with pytest.raises(ConfigError, match="there are no results to write"):
        write_csv(tmp_path / "b.csv", [])
    with pytest.raises(ConfigError, match="c.csv: cannot be written"):
        write_csv(tmp_path / "no" / "c.csv", [{"a": 1}])
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"] and to_json([1]) == "[1]"
    assert (tmp_path / "a.json").read_text() == "[1]\n"


# --- progress


def test_work_tells_how_long():
    states = []
    work = Work(["a", "bbb"], lambda *state: states.append(state), len)
    assert not work.complete and list(work) == ["a", "bbb"] and work.complete
    assert [state[:2] for state in states] == [(0, 4), (1, 4), (4, 4)]
    assert np.isnan(states[0][2]) and states[1][2] >= 0 and states[2][2] == 0
    assert Work([]).complete


def test_work_ends_where_it_is_stopped():
    def progress(done, total, left):
        if done == 2:
            raise KeyboardInterrupt

    work = Work(range(5), progress)
    assert list(work) == [0, 1] and not work.complete


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(float("nan"), ""), (0, "0 s"), (59.4, "59 s"), (60, "1:00 min"), (125, "2:05 min"), (4200, "1:10 h")],
)
def test_spoken(seconds, words):
    assert spoken(seconds) == words
