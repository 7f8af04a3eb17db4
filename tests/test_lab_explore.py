"""The generations explorer: what is in the page, that no text becomes code, what a browser makes of it."""

import html.parser
import json
import re
import shutil
from pathlib import Path

import pytest

from tinydrug.cli import main
from tinydrug.engine.record import FORMAT, Record
from tinydrug.errors import ConfigError
from tinydrug.lab.explore import explore
from tinydrug.lab.plan import Plan, read_plan
from tinydrug.lab.store import Store

NASTY = (
    "</script><script>document.title='owned'</script><img src=x onerror=\"document.title=''\"> <!-- & \u2028"
)
PLAN = {
    "prompts": ["The sea", NASTY],
    "seeds": [3, 8],
    "baselines": False,
    "grid": {"sites": ["H", "V"], "laws": ["uniform", "gauss"], "doses": [0.1, 0.4, 0.8]},
    "family": [{"name": "temperature", "temperature": [0.5, 1.0]}],
}
RECORD = {
    "kept": 0, "history": [], "rewind_every": 420, "n": 100, "stop": [], "ignore_eos": False,
    "shift_keep": None, "finish_reason": "length", "obstacle": None,
    "noise": {"schedule": {}, "seed": 3, "born": 0, "protect": [], "protect_ids": []},
    "sampling": {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0,
                 "repeat_last_n": 64, "presence_penalty": 0.0, "frequency_penalty": 0.0, "seed": 3,
                 "logit_bias": []},
}  # fmt: skip


def text_of(job) -> str:
    if job.condition.family == "sober":
        return "the fox ran home"
    if job.condition.level == 0.8:
        return NASTY
    return f"the {job.condition.name} fox {'ran' if job.seed == 3 else 'flew'} home"


def filled(path: Path, plan: Plan, name: str = "tiny", only=lambda job: True) -> Path:
    """A folder as a sweep would have left it."""
    model = {"name": name, "source": "here", "weights": "w", "quant": "none", "cache": "f16", "n_ctx": 128}
    about = {
        "model": model,
        "made_by": {"tinydrug": "0"},
        "plan": plan.to_dict(),
        "kl": {"V:0.4~gauss": 0.0123},
    }
    with Store.writing(path, about) as store:
        for job in filter(only, plan.jobs):
            text = text_of(job)
            store.add({
                "id": job.id, "prompt": job.prompt.name, "condition": job.condition.name, "seed": job.seed,
                "text": text, "tokens": len(text.split()), "ended": True, "nll": 1.0, "nll_tail": 1.0,
                "moved": {}, "ids": [5, 6, job.seed], "prompt_ids": [1, 2], "record": RECORD,
            })  # fmt: skip
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return filled(tmp_path_factory.mktemp("explore") / "sweep", read_plan(PLAN))


@pytest.fixture(scope="module")
def page(folder) -> Path:
    out = folder / "explore.html"
    assert explore([folder], out) == 2 * (1 + 2 * (12 + 2))
    return out


class Elements(html.parser.HTMLParser):
    """Counts what a browser would take for elements."""

    def __init__(self, text: str):
        super().__init__()
        self.scripts, self.images, self.links = 0, 0, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.scripts += tag == "script"
        self.images += tag == "img"
        self.links += [value for name, value in attrs if name in ("src", "href")]


def data_of(page: Path) -> list[dict]:
    return json.loads(re.search(r'id="data">(.*?)</script>', page.read_text("utf-8"), re.DOTALL)[1])


def test_the_page_stands_alone(page):
    text = page.read_text("utf-8")
    found = Elements(text)
    assert found.images == 0 and found.scripts == 3, "a text has become an element"
    assert found.links == ["data:,"] and "http" not in text.replace("http-equiv", "")
    assert "default-src 'none'" in text and len(text) < 200_000


def test_its_data(page):
    (sweep,) = data_of(page)
    assert sweep["families"] == ["H uniform", "H gauss", "V uniform", "V gauss", "temperature"]
    assert sweep["prompts"][1]["text"] == NASTY
    by_name = {each["name"]: i for i, each in enumerate(sweep["conditions"])}
    assert sweep["conditions"][by_name["V:0.4~gauss"]]["kl"] == 0.0123
    cell = dict(zip(sweep["metrics"], sweep["cells"][f"0/{by_name['V:0.4~gauss']}"], strict=True))
    assert cell["samples"] == 2 and cell["unique"] == 1 and cell["shared_prefix"] == 9
    sample = next(s for s in sweep["samples"] if s["c"] == by_name["V:0.8~gauss"] and s["seed"] == 8)
    assert sample["text"] == NASTY
    record = {"format": sweep["format"], "made_by": sweep["made_by"], "model": sweep["model"],
              "prompt_ids": sweep["prompts"][sample["p"]]["ids"], **sample["record"], "ids": sample["ids"],
              "text": sample["text"]}  # fmt: skip
    assert sweep["format"] == FORMAT and Record.from_dict(record).ids == (5, 6, 8)


def test_several_models_and_parts(folder, tmp_path):
    part = filled(tmp_path / "part", read_plan(PLAN), only=lambda job: job.condition.level < 0.2)
    other = filled(tmp_path / "other", read_plan(PLAN | {"seeds": 1}), "large")
    assert explore([folder, part, other], tmp_path / "page.html") == 58 + 18 + 30
    assert [sweep["name"] for sweep in data_of(tmp_path / "page.html")] == [
        *("tiny (sweep)", "tiny (part)", "large (other)")
    ]


@pytest.mark.parametrize("broken", ["nothing", "empty", "about", "plan"])
def test_no_results(broken, folder, tmp_path, capsys):
    path = tmp_path / "sweep"
    if broken == "empty":
        filled(path, read_plan(PLAN), only=lambda job: False)
    elif broken != "nothing":
        shutil.copytree(folder, path)
        (path / "sweep.json").write_text(
            {"about": "{", "plan": '{"plan": {}, "model": {"name": "x"}}'}[broken]
        )
    with pytest.raises(ConfigError):
        explore([path], tmp_path / "page.html")
    assert main(["lab", "explore", str(path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and str(path) in said


def test_command(folder, tmp_path, capsys):
    assert main(["lab", "explore", str(folder), "-o", str(tmp_path / "x.html")]) == 0
    assert "58 samples" in capsys.readouterr().err and (tmp_path / "x.html").exists()
    assert main(["lab", "explore", str(folder), "-o", str(tmp_path / "no" / "x.html")]) == 2


# --- in a browser -------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def browser():
    """Headless Chromium."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("there is no Chromium on this machine")
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def tab(browser, page):
    """tab(hash, **options) -> the page, opened; whatever it complains of fails the test."""
    errors, tabs = [], []

    def open_(hash: str = "", width: int = 1200, scheme: str = "light"):
        tab = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        tab.on("request", lambda request: errors.append(request.url) if request.url[:4] == "http" else None)
        tab.goto(page.as_uri() + hash)
        tabs.append(tab)
        return tab

    yield open_
    for tab in tabs:
        tab.close()
    assert errors == []


def test_it_begins_with_a_dose_beside_sober(tab):
    page = tab()
    assert page.inner_text("#left .text") == "the fox ran home"
    assert page.inner_text("#right .text") == "the H:0.4~uniform fox ran home"
    assert page.inner_text("#left .value") == "sober" and "θ = 0.4 rad" in page.inner_text("#right .value")
    marks = "els => els.map(e => e.textContent)"
    assert page.eval_on_selector_all("#left mark", marks) == []
    assert page.eval_on_selector_all("#right mark", marks) == ["H", ":", "0", ".", "4", "~", "uniform"]
    page.uncheck("#marks")
    assert page.eval_on_selector_all("mark", marks) == []


def test_keys_choose_and_the_address_remembers(tab):
    page = tab()
    page.focus("#right .level")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#right .text").startswith(NASTY[:60])
    page.select_option("#right .site", "V")
    page.select_option("#right .law", "gauss")
    page.keyboard.press("Tab")
    page.focus("#right .level")
    page.keyboard.press("ArrowLeft")
    assert "KL 0.0123" in page.inner_text("#right .value")
    page.select_option("#right .seed", "8")
    assert page.inner_text("#right .text") == "the V:0.4~gauss fox flew home"
    page.select_option("#left .site", "temperature")
    page.focus("#left .level")
    page.keyboard.press("End")
    assert page.inner_text("#left .value") == "T = 1" and page.is_disabled("#left .law")
    again = tab(page.evaluate("location.hash"))
    for pane in ("#left", "#right"):
        for part in (".text", ".value", ".facts"):
            assert again.inner_text(f"{pane} {part}") == page.inner_text(f"{pane} {part}")
    page.click("#swap")
    assert page.inner_text("#left .text") == "the V:0.4~gauss fox flew home"


@pytest.mark.parametrize(
    "hash", ["#", "#m=no&p=no&l=X;9;9&r=;;", "#l=V gauss;0.5;7&r=V gauss;99;1", "#%%%", "#p"]
)
def test_any_address_shows_something(hash, tab):
    page = tab(hash)
    assert page.inner_text("#left .text") and page.inner_text("#right .text")
    if "0.5" in hash:  # the nearest there is
        assert "θ = 0.4 rad" in page.inner_text("#left .value") and "seed 8" in page.inner_text(
            "#left .facts"
        )
        assert "θ = 0.8 rad" in page.inner_text("#right .value") and "seed 3" in page.inner_text(
            "#right .facts"
        )


def test_no_text_becomes_code(tab):
    page = tab("#l=V gauss;0.8;3&r=H gauss;0.8;8")
    page.select_option("#prompt", "1")
    page.wait_for_timeout(50)
    assert page.title() == "tinydrug: generations explorer"
    assert page.inner_text("#question").startswith(NASTY[:60]) and NASTY[:60] in page.inner_text(
        "#left .text"
    )
    assert page.eval_on_selector_all("img", "els => els.length") == 0


def test_the_record_is_whole(tab):
    page = tab("#l=V gauss;0.4;8")
    page.click("#left summary")
    assert Record.from_dict(json.loads(page.inner_text("#left .record"))).ids == (5, 6, 8)
    with page.expect_download() as download:
        page.click("#left .save")
    assert download.value.suggested_filename == "record-V_0.4_gauss-8.json"
    assert Record.load(download.value.path()).text == "the V:0.4~gauss fox flew home"


@pytest.mark.parametrize("width", [360, 1200])
def test_on_a_phone_and_in_the_dark(width, tab):
    page = tab(width=width, scheme="dark")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    left, right = (page.locator(pane).bounding_box() for pane in ("#left", "#right"))
    assert (left["x"] == right["x"]) == (width == 360)
    back, ink = (
        page.evaluate(f"getComputedStyle(document.body).{name}") for name in ("backgroundColor", "color")
    )
    dark = [int(x) for x in re.findall(r"\d+", back)]
    assert max(dark) < 60 < 180 < min(int(x) for x in re.findall(r"\d+", ink))
    page.click("#theme")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
