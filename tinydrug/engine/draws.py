"""What the noise kernels draw, shown outside of them: for tests, and whoever replays a run elsewhere."""

import numpy as np

from tinydrug.engine.doses import dose_table, law_of
from tinydrug.formats.config import Config
from tinydrug.formats.weights import padded
from tinydrug.kernels import drift
from tinydrug.kernels.memory import aligned
from tinydrug.kernels.noise import DRAWN, prepare_draw
from tinydrug.kernels.noise import LAWS as KERNELS
from tinydrug.kernels.tables import DOSE
from tinydrug.noise import SITES, Schedule
from tinydrug.noise.time import RENEWALS


def draw(
    schedule: Schedule,
    noise_seed: int,
    config: Config,
    site: str,
    layer: int,
    head: int,
    position: int,
    step: int,
    born: int = 0,
) -> tuple[float, np.ndarray]:
    """The angle phi (radians) and the direction r (width,) that meet one vector; only ratios of r matter.

    position: of the vector's token. step: of the token that reads it, equal to position for every site but
    K and V. head: kv head for pK, K and V; 0 for H and M. born: position of the first generated token, where
    ramps begin. Raises DrugError if the schedule does not fit, ValueError if it is sober there.
    """
    code = SITES[site].code
    given, table = schedule.table(config.n_layers), dose_table(schedule, config.n_layers, "f32")
    if given["theta"][layer, code] == 0:
        raise ValueError(f"site {site} of layer {layer} is sober")
    whole = {"H": config.hidden_size, "M": config.intermediate_size}
    if site in whole:
        width = half = whole[site]
        half_padded = padded(width)
        components = half_padded
    else:  # a head is two padded halves
        width, half, half_padded = config.head_dim, config.head_dim // 2, padded(config.head_dim) // 2
        components = 2 * half_padded
    out = aligned(components + 16, np.float32)
    dose = table[layer : layer + 1, code : code + 1]
    seed, cached = int(np.uint64(noise_seed).astype(np.int64)), int(site in ("K", "V"))
    drawn = DRAWN.rows()
    prepare_draw(drawn.ctypes.data, dose.ctypes.data, seed, code, head, step, step - born, cached)
    wandering = given["renewal"][layer, code] == RENEWALS["wander"][0]
    law = KERNELS[law_of(given["law"][layer, code])][int(wandering)]
    law.show(drawn.ctypes.data, position, components, out.ctypes.data)
    r = out[:components].reshape(-1, half_padded)[:, :half].reshape(width)
    return float(out[components]), r.astype(np.float64)


def diffusion_draw(noise_seed: int, config: Config, layer: int, head: int, position: int) -> np.ndarray:
    """The normal numbers (d,) that diffusion multiplies with its standard deviations at one head's output."""
    half, half_padded = config.head_dim // 2, padded(config.head_dim) // 2
    out, drawn, dose = aligned(2 * half_padded + 16, np.float32), DRAWN.rows(), DOSE.rows()
    dose["layer"] = layer
    seed = int(np.uint64(noise_seed).astype(np.int64))
    prepare_draw(drawn.ctypes.data, dose.ctypes.data, seed, drift.SITE, head, position, 0, 0)
    KERNELS["gauss"][0].show(drawn.ctypes.data, position, 2 * half_padded, out.ctypes.data)
    return out[: 2 * half_padded].reshape(2, half_padded)[:, :half].reshape(-1).astype(np.float64)
