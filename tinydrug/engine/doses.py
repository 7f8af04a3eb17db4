"""From a schedule to the table the kernels read: theta, and the addresses of the kernels of its law."""

import numpy as np

from tinydrug.kernels.noise import LAWS as KERNELS
from tinydrug.kernels.tables import DOSE
from tinydrug.noise import Schedule
from tinydrug.noise.laws import LAWS

KERNEL_OF = {LAWS[name].code: law for name, law in KERNELS.items()}


def dose_table(schedule: Schedule, n_layers: int, cell: str) -> np.ndarray:
    """(L, sites) rows of DOSE. Kernels are compiled for the laws that are used, no others."""
    given = schedule.table(n_layers)
    table = DOSE.rows(given.size).reshape(given.shape)
    for field in ("theta", "form", "angle"):
        table[field] = given[field]
    for code in np.unique(given["law"][given["theta"] > 0]):
        law, here = KERNEL_OF[int(code)], (given["law"] == code) & (given["theta"] > 0)
        table["rotate"][here] = law.rotate.address
        table["scores"][here] = law.scores[cell].address
        table["values"][here] = law.values[cell].address
    return table
