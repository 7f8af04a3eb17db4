"""Other engines as contenders: llama.cpp and OpenVINO, each in a process of its own."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from bench.shapes import SHAPES
from bench.synthetic import write_safetensors

EXPORT = {  # kinds of OpenVINO weights: the flags that make them
    "int8": ["--weight-format", "int8"],
    "int4": ["--weight-format", "int4", "--group-size", "128", "--ratio", "1.0", "--sym"],
}


class LlamaCpp(NamedTuple):
    """llama-bench on a GGUF file."""

    exe: str
    model: Path
    threads: int

    def speeds(self, p: int, n: int, depth: int = 0) -> tuple[float, float]:
        """Tokens a second of a prompt of p and of n generated tokens (0: not run), after so many others."""
        flags = {"-m": self.model, "-t": self.threads, "-p": p, "-n": n, "-d": depth, "-r": 1, "-o": "json"}
        rows = json.loads(_output([self.exe, *(str(word) for pair in flags.items() for word in pair)]))
        by_test = {row["n_prompt"] > 0: row["avg_ts"] for row in rows}
        return by_test.get(True, 0.0), by_test.get(False, 0.0)


class OpenVino:
    """A model folder in a child process, which stays warm and answers a line with a line."""

    def __init__(self, python: str, folder: Path, threads: int):
        script = Path(__file__).with_name("openvino_child.py")
        self._child = subprocess.Popen(
            [python, "-I", str(script), str(folder), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> "OpenVino":
        return self

    def __exit__(self, *exception) -> None:
        self._child.stdin.close()
        self._child.wait()

    def speeds(self, p: int, n: int) -> tuple[float, float]:
        """Tokens a second of a prompt of p, of which it computes all logits, and of n tokens after it."""
        print(p, n, file=self._child.stdin, flush=True)
        answer = self._child.stdout.readline()
        if not answer:
            sys.exit(f"the OpenVINO process ended with status {self._child.wait()}")
        prefill, decode = map(float, answer.split())
        return prefill, decode


def openvino_folder(python: str, name: str, kind: str, scratch: Path) -> Path:
    """A shape's OpenVINO model with weights of a kind (int8, int4); made if it is not there. Minutes."""
    folder = scratch / f"{name}-openvino-{kind}"
    if folder.exists():
        return folder
    source, partial = scratch / f"{name}-hf", scratch / f"{folder.name}.partial"
    for leftover in (source, partial):
        shutil.rmtree(leftover, ignore_errors=True)
    write_safetensors(SHAPES[name], source)
    command = [Path(python).with_name("optimum-cli"), "export", "openvino", "--model", source]
    task = ["--task", "text-generation-with-past"]
    _output([str(word) for word in [*command, *task, *EXPORT[kind], partial]])
    shutil.rmtree(source)
    return partial.rename(folder)


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{command[0]} failed with status {done.returncode}: {done.stderr.strip()[-300:]}")
    return done.stdout
