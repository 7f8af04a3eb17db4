"""From a schedule to the tables the kernels read: theta and the kernels of its law, drift and diffusion."""

import numpy as np

from tinydrug.errors import DrugError
from tinydrug.formats.config import Config
from tinydrug.kernels.noise import LAWS as KERNELS
from tinydrug.kernels.tables import DOSE, TERM
from tinydrug.noise import SITES, Schedule
from tinydrug.noise.laws import LAWS
from tinydrug.noise.time import RENEWALS


def dose_table(schedule: Schedule, n_layers: int, cell: str) -> np.ndarray:
    """(L, sites) rows of DOSE. Kernels are compiled for the laws that are used, no others."""
    given = schedule.table(n_layers)
    table = DOSE.rows(given.size).reshape(given.shape)
    for field in ("theta", "form", "angle", "renewal", "tokens", "ramp", "over"):
        table[field] = given[field]
    table["layer"] = np.where(given["tied"], -1, np.arange(n_layers)[:, None])
    wanders = given["renewal"] == RENEWALS["wander"][0]
    dosed = given["theta"] > 0
    for code, wandering in np.unique(np.stack([given["law"], wanders], -1)[dosed], axis=0):
        law = KERNELS[law_of(code)][int(wandering)]
        here = dosed & (given["law"] == code) & (wanders == wandering)
        for site in SITES.values():  # compile what will be used, no more
            column = here[:, site.code]
            if not column.any():
                continue
            if site.letter == "K":
                table["keys"][column, site.code] = law.keys[cell].address
            elif site.letter == "V":
                table["values"][column, site.code] = law.values[cell].address
            else:
                table["rotate"][column, site.code] = law.rotate.address
    return table


def term_table(schedule: Schedule, config: Config) -> np.ndarray:
    """(L,) rows of TERM. DrugError for a learned diffusion that the model does not have."""
    given = schedule.term_table(config.n_layers)
    if given["learned"].any() and not (config.drift and config.drift.diffusion_param):
        raise DrugError(
            f"diffusion:learned needs a dd-gpt2 with attn.diffusion_param, this is a {config.model_type}: "
            "write diffusion:STD, for instance diffusion:0.1"
        )
    table = TERM.rows(config.n_layers)
    for name in TERM.dtype.names:
        table[name] = given[name]
    return table


def law_of(code: int) -> str:
    """The name of the law with this code; laws may be registered at any time."""
    return next(name for name, choice in LAWS.items() if choice.code == code)
