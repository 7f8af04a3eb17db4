"""One self-contained HTML page: data, script, style and Plotly inside, nothing fetched, light and dark."""

import html
from importlib.util import find_spec
from pathlib import Path

from tinydrug.errors import ConfigError
from tinydrug.lab.results import to_json

POLICY = (  # the browser itself refuses any network
    "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; "
    "img-src data: blob:; worker-src blob:"
)
STYLE = """
:root { --back: #ffffff; --panel: #f3f5f7; --ink: #1b1f24; --soft: #59636e; --line: #d1d9e0;
        --one: #0072b2; --two: #d55e00; --three: #007a5a; color-scheme: light; }
:root[data-theme=dark] { --back: #14171b; --panel: #1f242b; --ink: #e6e9ed; --soft: #9aa4af; --line: #3a424c;
        --one: #56b4e9; --two: #f0a050; --three: #3fd0a4; color-scheme: dark; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1200px; padding: 1rem; background: var(--back); color: var(--ink);
       font: 16px/1.5 system-ui, sans-serif; }
header { display: flex; gap: 1rem; align-items: baseline; flex-wrap: wrap; }
h1 { font-size: 1.3rem; margin: 0; flex: 1; }
.soft, figcaption, label { color: var(--soft); }
.controls { display: flex; gap: .8rem 1.4rem; flex-wrap: wrap; align-items: center; padding: .8rem;
            margin: 1rem 0; background: var(--panel); border-radius: 8px; }
.controls label { display: flex; gap: .5rem; align-items: center; }
select, button, input { font: inherit; color: var(--ink); background: var(--back); accent-color: var(--one);
            border: 1px solid var(--line); border-radius: 6px; padding: .2rem .5rem; }
:focus-visible { outline: 3px solid var(--one); outline-offset: 1px; }
pre, code, .mono { font-family: ui-monospace, monospace; }
pre { overflow-x: auto; }
table { border-collapse: collapse; } th, td { padding: .2rem .6rem; text-align: right; }
th:first-child, td:first-child { text-align: left; } tr { border-bottom: 1px solid var(--line); }
details { margin: 1rem 0; } details pre { white-space: pre-wrap; overflow-wrap: anywhere; }
"""
THEME = """
const root = document.documentElement;
function theme(name) {
  root.dataset.theme = name;
  window.dispatchEvent(new Event("theme"));
}
theme(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
function color(name) { return getComputedStyle(root).getPropertyValue("--" + name).trim(); }
window.addEventListener("DOMContentLoaded", () => {
  document.getElementById("theme").onclick = () => theme(root.dataset.theme === "dark" ? "light" : "dark");
});
"""


def page(title: str, body: str, script: str, data, *, style: str = "", plotly: bool = False) -> str:
    """A page with this body (HTML), whose script finds `data` (plain data) as DATA, and color("ink") and
    so on; the window gets a "theme" event when light and dark change places. plotly: with Plotly in it.

    ConfigError if Plotly is needed and not installed.
    """
    library = f"<script>{_plotly()}</script>" if plotly else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<link rel="icon" href="data:,">
<style>{STYLE}{style}</style>
<script>{THEME}</script>
{library}
</head>
<body>
<header><h1>{html.escape(title)}</h1><button id="theme" type="button">light / dark</button></header>
{body}
<script type="application/json" id="data">{_inert(to_json(data))}</script>
<script>
const DATA = JSON.parse(document.getElementById("data").textContent);
{script}
</script>
</body>
</html>
"""


def parts(name: str) -> tuple[str, str, str]:
    """Body, script and style of a page of this package."""
    folder = Path(__file__).parent / "pages"
    return tuple((folder / f"{name}.{kind}").read_text("utf-8") for kind in ("html", "js", "css"))


def need(*libraries: str) -> None:
    """ConfigError unless these libraries of the [lab] extra are installed: told before long work begins."""
    for library in libraries:
        if find_spec(library) is None:
            raise ConfigError(f"{library} is not installed: pip install 'tinydrug[lab]'", library)


def _plotly() -> str:
    need("plotly")
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


def _inert(text: str) -> str:
    """JSON that no HTML parser takes for the end of its element or for a comment."""
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
