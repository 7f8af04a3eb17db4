"""The structure, read from the source: who imports whom, what stays in its place, what has one name."""

import ast
import gc
import importlib
from collections import Counter
from pathlib import Path

import pytest

import tinydrug
from tinydrug.noise import SITES

PACKAGE = Path(tinydrug.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
RANKS = ["kernels", "formats", "noise", "models", "engine", "text", "hub", "api", "loading", "lab"]
TOP = ["cli", "server", "__main__"]  # on all of these, and never on each other
HEAVY = {"tokenizers", "sentencepiece", "jinja2", "gguf", "huggingface_hub", "safetensors"}
HEAVY |= {"matplotlib", "plotly", "scipy", "dask", "distributed"}


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, everywhere: bool = True) -> set[str]:
    """Full names of what a file imports; without `everywhere`, only when it is itself imported."""
    tree, found = ast.parse(path.read_text()), set()
    package = module_of(path) if path.name == "__init__.py" else module_of(path).rpartition(".")[0]
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: 1 - node.level or None] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def part_of(module: str) -> str | None:
    """tinydrug.engine.session -> engine; None for what is not in the package."""
    first, *rest = module.split(".")
    return None if first != "tinydrug" else rest[0] if rest else ""


def libraries(path: Path, everywhere: bool = True) -> set[str]:
    return {module.split(".")[0] for module in imports(path, everywhere)}


def calls(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]


def each_source(*, but=()):
    chosen = [path for path in SOURCES if part_of(module_of(path)) not in but]
    return pytest.mark.parametrize("path", chosen, ids=lambda path: str(path.relative_to(PACKAGE)))


@each_source(but=["", "errors"])
def test_imports_only_go_down(path):
    """A package imports from those before it in RANKS, and errors; what is on top, from all of them."""
    order = {name: rank for rank, name in enumerate(RANKS)} | dict.fromkeys(TOP, len(RANKS))
    here = part_of(module_of(path))
    assert here in order, f"say where {here} stands"
    public = {*tinydrug.__all__, ""}  # what the package itself gives on demand
    for module in imports(path):
        there = part_of(module)
        if there in (None, "errors", here) or (here in TOP and there in public):
            continue
        assert there in order and order[there] < order[here], f"{here} imports {module}"


@each_source(but=["kernels"])
def test_numba_lives_in_kernels(path):
    assert not libraries(path) & {"numba", "llvmlite", "torch", "transformers"}


def test_numba_is_imported_to_compile_and_for_nothing_else():
    """A process that finds its kernels compiled starts without Numba, in half the time."""
    found = [
        str(path.relative_to(PACKAGE)) for path in SOURCES if "numba" in libraries(path, everywhere=False)
    ]
    assert found == ["kernels/compiler.py"]
    at_once = [path for path in SOURCES if "tinydrug.kernels.compiler" in imports(path, everywhere=False)]
    assert not at_once


@each_source()
def test_heavy_libraries_are_imported_where_they_are_used(path):
    """Start-up time: a library that one path in ten needs is not loaded at import."""
    assert not libraries(path, everywhere=False) & HEAVY


@each_source()
def test_nothing_turns_data_into_code(path):
    """Checkpoints are data. Only compiled kernels are code: object files, in a folder of the user's own."""
    assert not libraries(path) & {"pickle", "marshal", "shelve", "dill", "cloudpickle"}
    for call in calls(path):
        name = call.func.id if isinstance(call.func, ast.Name) else None
        assert name not in ("eval", "exec", "compile", "__import__"), f"line {call.lineno}: {name}"
        assert "shell" not in [word.arg for word in call.keywords], f"line {call.lineno}: a shell"


@each_source(but=TOP)
def test_the_library_does_not_print(path):
    for call in calls(path):
        name = call.func.id if isinstance(call.func, ast.Name) else None
        assert name not in ("print", "input"), f"line {call.lineno}"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "sys":
            assert node.attr not in ("stdout", "exit"), f"line {node.lineno}: sys.{node.attr}"


@each_source()
def test_every_file_says_what_it_is(path):
    assert path.read_text().startswith('"""') and ast.get_docstring(ast.parse(path.read_text()))


MODEL_FILES = [path for path in (PACKAGE / "models").glob("*.py") if "def forward(" in path.read_text()]


def test_there_are_model_files():
    assert {path.stem for path in MODEL_FILES} >= {"llama", "gpt2"}


@pytest.mark.parametrize("path", MODEL_FILES, ids=lambda path: path.stem)
def test_every_site_is_one_line_of_a_model_file(path):
    """Every place where noise can enter is a line that says noise, and no model asks whether it does."""
    tree = ast.parse(path.read_text())
    forward = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "forward")
    noisy = [
        node
        for node in ast.walk(forward)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "noise"
    ]
    in_order = sorted(noisy, key=lambda node: (node.lineno, node.col_offset))
    assert [node.args[0].value for node in in_order] == list(SITES)
    branches = [node for node in ast.walk(forward) if isinstance(node, (ast.If, ast.IfExp))]
    assert not branches, f"line {branches[0].lineno}: a model asks no questions"


def test_kernel_names_are_unique():
    """A name is a symbol and a file of the cache: two kernels of one name would run each other's code."""
    from tinydrug.kernels.jit import Kernel

    for path in (PACKAGE / "kernels").glob("*.py"):
        importlib.import_module(module_of(path))
    names = Counter(kernel.name for kernel in gc.get_objects() if type(kernel) is Kernel)
    assert len(names) > 50 and max(names.values()) == 1, names.most_common(3)


@pytest.mark.parametrize(
    ("file", "registry"),
    [
        ("kernels/attention.py", "ATTEND"),
        ("kernels/laws.py", "LAWS"),
        ("kernels/noise.py", "LAWS"),
        ("models/__init__.py", "MODELS"),
        ("models/rope.py", "ROPES"),
        ("noise/sites.py", "SITES"),
    ],
)
def test_registries_are_where_one_looks(file, registry):
    """A dict near the foot of the file that defines its entries: nothing is assigned after it."""
    assigned = []
    for node in ast.parse((PACKAGE / file).read_text()).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        assigned += [target.id for target in targets if isinstance(target, ast.Name)]
    assert assigned[-1] == registry
