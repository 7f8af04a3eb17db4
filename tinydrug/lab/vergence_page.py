"""The page of a vergence measurement: a slider over injection depth, the surface, the top tokens."""

import numpy as np

from tinydrug.lab.page import page, parts
from tinydrug.lab.vergence import Vergence
from tinydrug.noise import SITES


def vergence_page(found: Vergence) -> str:
    """The page as text. ConfigError without Plotly."""
    settings, model = found.record["settings"], found.record["model"]
    where = "every position" if settings["prompt"] == "all" else "the last position"
    weights = "as in its file" if model["quant"] == "none" else model["quant"]
    about = (
        f"{model['name']}, weights {weights}; noise of law {settings['law']} at {where} from "
        f"{settings['sink']} on; mean of {len(settings['seeds'])} noise seeds. "
        f"Prompt: {settings['prompt_text']}"
    )
    data = {
        "sites": found.sites,
        "what": [SITES[site].array for site in found.sites],
        "windows": found.windows,
        "doses": found.doses,
        "divergence": _short(found.divergence),
        "kl": _short(found.kl),
        "flips": _short(found.flips),
        "tokens": found.record["top_tokens"],
        "sober": _short(found.sober),
        "drugged": _short(found.drugged),
        "show": found.middle,
        "about": about,
        "record": found.record,
    }
    title, (body, script, style) = "Vergence: how far noise drives hidden states apart", parts("vergence")
    return page(title, body, script, data, style=style, plotly=True)


def _short(values: np.ndarray) -> np.ndarray:
    """Four significant digits: a page needs no more."""
    with np.errstate(invalid="ignore", divide="ignore"):
        digits = 10.0 ** (3 - np.floor(np.log10(np.where(values > 0, values, 1))))
    return np.round(values * digits) / digits
