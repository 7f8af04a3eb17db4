"""From starting the command to its first token, and the very first time, when everything is compiled.

    python -m bench.start [--model smollm2.gguf]

The process is started anew every time, and Python keeps compiled sources, as it does unless told otherwise.
What Python and the libraries that were imported take alone is measured in turns with it; the rest is our own
code's.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from bench.card import Row, run

CLI = str(Path(__file__).parent.parent / "cli.py")
IMPORTED = """
import json, runpy, sys
sys.argv[0] = "cli.py"
try:
    runpy.run_path({cli!r}, run_name="__main__")
except SystemExit:
    pass
names = [name for name in sys.modules if name.partition(".")[0] not in ("tinydrug", "__main__")]
print(json.dumps(names), file=sys.stderr)
"""
ALONE = """
import importlib, sys
for name in sys.argv[1].split(","):
    try:
        importlib.import_module(name)
    except ImportError:  # a name that a library made up
        pass
"""


def measure(args: argparse.Namespace) -> Iterable[Row]:
    flags = [*(["-m", args.model] if args.model else []), "-t", str(args.threads), "-q", "-n", "2"]
    flags += ["-no-cnv", "-p", "Once upon a time"]
    _first_token(flags)  # compiles what is missing, or Numba would be among the libraries
    script = IMPORTED.format(cli=CLI)
    said = subprocess.run([sys.executable, "-c", script, *flags], capture_output=True, text=True, check=True)
    libraries = ",".join(json.loads(said.stderr.splitlines()[-1]))
    seconds = defaultdict(list)
    for _ in range(args.rounds):
        seconds["first token"].append(_first_token(flags))
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", ALONE, libraries], check=True)
        seconds["libraries"].append(time.perf_counter() - start)
    with tempfile.TemporaryDirectory(prefix="tinydrug-bench-") as folder:
        fresh = _first_token(flags, TINYDRUG_CACHE_DIR=folder)
    first, libraries = (statistics.median(seconds[what]) for what in ("first token", "libraries"))
    yield Row("start to first token", first, "s", most=1.2)
    yield Row("of it our own code", first - libraries, "s", "libraries alone", libraries)
    yield Row("of it our own code", first - libraries, "s", most=0.5)
    yield Row("first compile of what a sober run needs", fresh - first, "s", most=30)


def _first_token(flags: list[str], **variables: str) -> float:
    """Seconds from the start of the process to the first character it writes."""
    start = time.perf_counter()
    words = [sys.executable, CLI, *flags]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | variables
    with subprocess.Popen(words, stdout=subprocess.PIPE, env=environment) as process:
        if not process.stdout.read(1):
            sys.exit(f"the command wrote nothing, status {process.wait()}")
        return time.perf_counter() - start


if __name__ == "__main__":
    run(__doc__, measure)
