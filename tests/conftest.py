"""Fixtures shared by all test files: tiny checkpoints, golden numbers, real models where there are any."""

import os
from pathlib import Path

import numpy as np
import pytest
import tiny
from engines import runtime
from hypothesis import settings

settings.register_profile("same every time", derandomize=True, deadline=None)
settings.load_profile("same every time")

CHECKOUT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """tiny_model(name) -> folder of that checkpoint of tiny.SPECS, built once a session."""
    root, built = tmp_path_factory.mktemp("tiny"), {}

    def make(name: str) -> Path:
        if name not in built:
            built[name] = tiny.build(name, root / name)
        return built[name]

    return make


@pytest.fixture(scope="module")
def runtimes(tiny_model):
    """runtimes(name, **options) -> engines.runtime of a tiny checkpoint, built once for these options."""
    built = {}

    def make(name: str, **options):
        key = (name, *sorted(options.items(), key=str))
        if key not in built:
            built[key] = runtime(tiny_model(name), **options)
        return built[key]

    yield make
    for each in built.values():
        each.close()


@pytest.fixture(scope="session")
def golden():
    """golden(name) -> the arrays of tests/golden/models/<name>.npz; make_models.py says what they are."""

    def read(name: str) -> dict[str, np.ndarray]:
        with np.load(CHECKOUT / "tests" / "golden" / "models" / f"{name}.npz") as arrays:
            return dict(arrays)

    return read


@pytest.fixture(scope="session")
def shared() -> Path | None:
    """The folder of shared material beside the checkout (real texts, stories260k), or None."""
    folder = CHECKOUT.parent / "shared"
    return folder if folder.is_dir() else None


@pytest.fixture(scope="session")
def stories260k(shared) -> Path:
    """Folder of the real tiny Llama, or skip."""
    folder = shared / "models" / "stories260k" if shared else None
    if folder is None or not folder.is_dir():
        pytest.skip("stories260k is not beside the checkout (../shared/models/stories260k)")
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real default model's GGUF: $TINYDRUG_TEST_MODEL, else the one in weights/smollm2-135m, or skip."""
    given = os.environ.get("TINYDRUG_TEST_MODEL")
    found = [Path(given)] if given else sorted((CHECKOUT / "weights" / "smollm2-135m").glob("*.gguf"))
    if not found:
        pytest.skip("no SmolLM2: set TINYDRUG_TEST_MODEL, or put the GGUF into weights/smollm2-135m")
    return found[0]
