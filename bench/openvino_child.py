"""OpenVINO's side of a comparison: run by another Python, which has openvino and nothing of ours.

    python openvino_child.py FOLDER THREADS

For each line "P N" on standard input: read a prompt of P tokens, then generate N, and answer with the tokens
a second of both.
"""

import sys
import time

import numpy as np
import openvino


class Model:
    """A stateful language model; `past` tokens are in its cache."""

    def __init__(self, folder, threads):
        options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        options["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = "128"
        compiled = openvino.Core().compile_model(f"{folder}/openvino_model.xml", "CPU", options)
        self._names = {name.any_name for name in compiled.inputs}
        self._request, self.past = compiled.create_infer_request(), 0

    def reset(self):
        self._request.reset_state()
        self.past = 0

    def feed(self, ids):
        """Seconds that these tokens take, all logits included."""
        n, end = len(ids), self.past + len(ids)
        inputs = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(self.past, end, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        start = time.perf_counter()
        self._request.infer({name: value for name, value in inputs.items() if name in self._names})
        self.past += n
        return time.perf_counter() - start


def main():
    model = Model(sys.argv[1], int(sys.argv[2]))
    for line in sys.stdin:
        p, n = map(int, line.split())
        ids = np.random.default_rng(0).integers(0, 300, p + n).tolist()
        model.reset()
        model.feed(ids[:p])  # warm
        model.reset()
        prefill = model.feed(ids[:p])
        decode = sum(model.feed([token]) for token in ids[p:])
        print(p / prefill, n / decode if n else 0, flush=True)


main()
