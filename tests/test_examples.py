"""The programs in examples/ run, as they stand, on any model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
SHOWS = {  # program: what it prints
    "generate": ["sober: The sea is", "seed 3: The sea is", "(0 vectors moved)"],
    "batch": ["sober", "K:0.5,V:0.5", "tokens a second together", "the last one alone is the same"],
    "score": ["perplexity", "sober", "0.0000", "100%", "H:0.2"],
}


def test_each_example_is_tested():
    assert {path.stem for path in (CHECKOUT / "examples").glob("*.py")} == SHOWS.keys()


@pytest.mark.parametrize("name", SHOWS)
def test_example(name, stories260k):
    done = subprocess.run(
        [sys.executable, "-W", "error", CHECKOUT / "examples" / f"{name}.py", stories260k],
        env=os.environ | {"PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    for text in SHOWS[name]:
        assert text in done.stdout
