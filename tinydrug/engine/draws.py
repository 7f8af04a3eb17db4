"""What the noise kernels draw, shown outside of them: for tests, records, and whoever wants to replay a run
elsewhere."""

import numpy as np

from tinydrug.engine.doses import KERNEL_OF, dose_table
from tinydrug.formats.config import Config
from tinydrug.formats.weights import padded
from tinydrug.kernels.memory import aligned
from tinydrug.kernels.noise import LAWS
from tinydrug.noise import SITES, Schedule


def draw(schedule: Schedule, noise_seed: int, config: Config, site: str, layer: int, head: int, position: int,
         step: int) -> tuple[float, np.ndarray]:  # fmt: skip
    """The angle phi (radians) and the direction r (width,) that meet one vector; ratios of r matter, not its
    length.

    position: of the vector's token. step: of the token that reads it, equal to position for every site but
    K and V. head: kv head for pK, K and V; 0 for H. Raises DrugError if the schedule does not fit,
    ValueError if it is sober there.
    """
    code = SITES[site].code
    given, table = schedule.table(config.n_layers), dose_table(schedule, config.n_layers, "f32")
    if given["theta"][layer, code] == 0:
        raise ValueError(f"site {site} of layer {layer} is sober")
    if site == "H":
        width, half, half_padded = config.hidden_size, config.hidden_size, padded(config.hidden_size)
        components = half_padded
    else:  # a head is two padded halves
        width, half, half_padded = config.head_dim, config.head_dim // 2, padded(config.head_dim) // 2
        components = 2 * half_padded
    out = aligned(components + 16, np.float32)
    row = table[layer : layer + 1, code : code + 1]
    law = LAWS[KERNEL_OF[int(given["law"][layer, code])]]
    seed = int(np.uint64(noise_seed).astype(np.int64))
    law.draw(row.ctypes.data, seed, layer, code, head, position, step, components, out.ctypes.data)
    r = out[:components].reshape(-1, half_padded)[:, :half].reshape(width)
    return float(out[components]), r.astype(np.float64)
