"""What pictures share: a figure without a window, colours for everybody, a file whole or not at all."""

import os
from pathlib import Path

from tinydrug.engine.files import replacing
from tinydrug.lab.page import need

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe and Ito's
MARKS = "osD^vPX"


def figure(width: float, height: float):
    """An empty matplotlib figure, in inches. ConfigError without matplotlib."""
    need("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(made)
    return made


def save(made, path: str | os.PathLike) -> Path:
    """Write a figure as PNG. ConfigError naming the path."""
    with replacing(path) as partial:
        made.savefig(partial, format="png", metadata={"Software": None})
    return Path(path)
