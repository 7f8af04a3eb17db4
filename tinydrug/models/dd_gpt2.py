"""Drift-diffusion GPT-2: GPT-2 whose attention output drifts, and diffuses if asked to, before c_proj.

The document that describes this model and the code that trained it disagree. The rank of drift_param shows
which of them a checkpoint follows; where nothing shows it, the code wins. x is attention's output by heads:

                 document                        code                                   here
    drift_param  (n_head, 1, 1)                  (n_head, head_dim)                     by rank
    drift        x + drift_param x               g = sigmoid(drift_param),              by rank
                                                 x + g (x - baseline)
    baseline     no such parameter; the flag     (n_head, head_dim) if                  as the code, for
                 says "to each head on its own"  baseline_each_head, else 0             its own form only
    diffusion    x + diffusion_std N(0, 1),      x + diffusion_param N(0, 1) in         off, unless the
                 always                          training, x at inference               schedule asks for it
    flags        true or false in examples       an AttributeError without them         told by the tensors

Drift is deterministic, x' = gain x - shift, so it is folded into c_proj: its rows times gain, its bias less
the image of shift, in float and before any quantisation. Noise at A comes before it: A is what attention
gives. The terms of a schedule come after it, drift then diffusion, as in the document: `diffusion:0.1,sink=0`
with `prompt=all` is the document's model, `diffusion:learned` with the same the code's in training. They are
computed before c_proj, so they are carried back through the drift: a share is one of the way from the drift's
fixed point, shift / gain, and noise is divided by the gain.
"""

import logging
from dataclasses import replace
from functools import partial

import numpy as np

from tinydrug.errors import BadModelFile
from tinydrug.formats.config import Config, Drift, Fields
from tinydrug.formats.tensor import Tensor
from tinydrug.formats.weights import Need
from tinydrug.models import gpt2

log = logging.getLogger("tinydrug")

FLAGS = {  # of the config: the tensor of each layer that it is about
    "apply_drift": "drift_param",
    "baseline_each_head": "baseline",
    "apply_diffusion": "diffusion_param",
}
# A head this close to erased keeps this much, for noise after it to get through; q8 may be too coarse for it.
LEAST_GAIN = 2.0**-20

IGNORED, tensors, forward = gpt2.IGNORED, gpt2.tensors, gpt2.forward  # all drift is in the weights


def config(fields: Fields, tensors: dict[str, Tensor]) -> Config:
    """From config.json of GPT-2 with the three flags; one that is absent is told by the tensors."""
    c = gpt2.config(fields, tensors)
    first = {name: tensors.get(f"h.0.attn.{name}") for name in FLAGS.values()}
    flags = {flag: fields.get(flag, bool, None) for flag in FLAGS}
    if absent := [flag for flag, value in flags.items() if value is None]:
        flags |= {flag: first[FLAGS[flag]] is not None for flag in absent}
        told = ", ".join(f"{flag} is {str(flags[flag]).lower()}" for flag in absent)
        log.warning("%s: by the tensors, for the config does not say: %s", fields.path, told)
    shape = _shape(c, first["drift_param"]) if flags["apply_drift"] else None
    std = fields.get("diffusion_std", float, None)
    documented = first["diffusion_param"] is None and (std is not None or shape == (c.n_heads, 1, 1))
    learned = flags["apply_diffusion"] and not documented
    if flags["apply_diffusion"]:
        how = "learned" if learned else std or "STD"
        log.info("%s: its diffusion is off, as in the code that trained it: --diffusion %s", fields.path, how)
    baseline = flags["baseline_each_head"] and shape == (c.n_heads, c.head_dim)
    return replace(c, model_type="dd-gpt2", drift=Drift(shape, baseline, learned))


def _shape(c: Config, drift_param: Tensor | None) -> tuple[int, ...]:
    """What drift_param should be: by rank the document's or the code's, the code's where there is none."""
    shapes = {3: (c.n_heads, 1, 1), 2: (c.n_heads, c.head_dim)}
    if drift_param is None:
        return shapes[2]
    if len(drift_param.shape) not in shapes:
        reason = f"is {drift_param.shape}, expected {shapes[2]}, a gate, or {shapes[3]}, a factor"
        raise BadModelFile(drift_param.path, reason, drift_param.name)
    return shapes[len(drift_param.shape)]


def needs(c: Config, gguf: bool) -> dict[str, Need]:
    """GPT-2's tensors, the drift folded into c_proj, and what a schedule's terms must know of the drift."""
    out, each = gpt2.needs(c, gguf), (c.n_heads, c.head_dim)
    for i in range(c.n_layers):
        drift = {"drift_param": c.drift.drift_param} if c.drift.drift_param else {}
        drift |= {"baseline": each} if c.drift.baseline else {}
        own = drift | ({"diffusion_param": each} if c.drift.diffusion_param else {})
        also = {name: (f"h.{i}.attn.{name}", shape) for name, shape in own.items()}
        if drift:
            c_proj = out[f"{i}.attn_proj"]
            out[f"{i}.attn_proj"] = replace(c_proj, also=tuple(also[name] for name in drift), change=fold)
        if own:
            (source, shape), *rest = also.values()
            rows = partial(carry_back, names=tuple(own), width=c.head_dim)
            out[f"{i}.drift"] = Need(
                source, shape, role="table", out_head=c.head_dim, also=tuple(rest), change=rows
            )
    return out


def gain_and_shift(width: int, drift_param: np.ndarray, baseline: np.ndarray | float = 0.0):
    """drift_param (H, d) or (H, 1, 1), baseline (H, d) -> gain, shift (H, d) float64: x' = gain x - shift."""
    if drift_param.ndim == 3:
        share = drift_param[:, 0].astype("f8")  # (H, 1)
    else:
        share = 0.5 + 0.5 * np.tanh(0.5 * drift_param.astype("f8"))  # the sigmoid, which exp would overflow
    share = np.broadcast_to(share, (len(share), width))
    gain = 1 + share
    return np.where(abs(gain) < LEAST_GAIN, np.copysign(LEAST_GAIN, gain), gain), share * baseline


def fold(weight: np.ndarray, bias: np.ndarray, drift_param: np.ndarray, *baseline: np.ndarray):
    """c_proj's weight (in, out) and bias (out,) -> those that make of x what it makes of gain x - shift."""
    gain, shift = gain_and_shift(len(weight) // len(drift_param), drift_param, *baseline)
    return weight * gain.reshape(-1, 1), bias - shift.reshape(-1) @ weight


def carry_back(first: np.ndarray, _, *rest: np.ndarray, names: tuple[str, ...], width: int):
    """What the operation before c_proj works with, (3, H d): the point that drift leaves where it is, 1 and
    diffusion_param divided by the gain."""
    own = dict(zip(names, (first, *rest), strict=True))
    std = own.pop("diffusion_param", np.zeros((len(first), width)))
    gain, shift = gain_and_shift(width, **own) if own else (np.ones(std.shape), np.zeros(std.shape))
    return np.stack([shift / gain, 1 / gain, std / gain]).reshape(3, -1), None
