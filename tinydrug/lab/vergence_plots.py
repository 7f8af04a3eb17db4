"""Pictures of a vergence measurement: one for all sites, one for each, as PNG."""

from pathlib import Path

import numpy as np

from tinydrug.lab.figure import COLORS, MARKS, figure, save
from tinydrug.lab.vergence import Vergence


def save_plots(found: Vergence, folder: Path) -> list[Path]:
    """Write vergence-sites.png and vergence-SITE.png. ConfigError without matplotlib, or if it cannot be."""
    paths = [save(_sites(found), folder / "vergence-sites.png")]
    for s, site in enumerate(found.sites):
        paths.append(save(_site(found, s), folder / f"vergence-{site}.png"))
    return paths


def _sites(found: Vergence):
    """What is left of each site's push after the last layer, by injection window, at one dose."""
    picture, d = figure(9, 4.5), found.middle
    axes = picture.add_subplot()
    centres = found.windows.mean(1)
    for s, site in enumerate(found.sites):
        values, error = found.divergence[s, :, d, -1], np.nan_to_num(found.error[s, :, d, -1])
        style = {"color": COLORS[s % 7], "marker": MARKS[s % 7], "ms": 4, "lw": 1.3}
        axes.plot(centres, values, label=site, **style)
        axes.fill_between(centres, values - error, values + error, color=COLORS[s % 7], alpha=0.15, lw=0)
    if (found.divergence[:, :, d, -1] > 0).any():
        axes.set_yscale("log")
    axes.set_xlabel(f"centre of the injection window ({_window(found)}), layer")
    axes.set_ylabel("1 − cos after the last layer")
    axes.set_title(f"Divergence of the last token's hidden state, θ = {found.doses[d]:g} rad")
    axes.grid(alpha=0.3)
    axes.legend(title="site", ncols=4)
    return picture


def _site(found: Vergence, s: int):
    """Through the layers at one dose; and after the last layer at every dose."""
    picture, d = figure(11, 4.6), found.middle
    left, right = picture.subplots(1, 2)
    through, L = found.divergence[s, :, d], found.divergence.shape[-1]
    first, last = found.windows[:, 0].min(), found.windows[:, 0].max()
    mesh = left.imshow(
        through, origin="lower", aspect="auto", norm=_norm(through), cmap="cividis", interpolation="nearest",
        extent=(-0.5, L - 0.5, first - 0.5, last + 0.5) if last > first else None,
    )  # fmt: skip
    picture.colorbar(mesh, ax=left, label="1 − cos")
    left.set_xlabel("layer")
    left.set_ylabel(f"first layer of the injection window ({_window(found)})")
    left.set_title(f"site {found.sites[s]}, θ = {found.doses[d]:g} rad: through the network")
    ends = found.divergence[s, :, :, -1]
    mesh = right.imshow(
        ends.T, origin="lower", aspect="auto", norm=_norm(ends), cmap="cividis", interpolation="nearest"
    )
    picture.colorbar(mesh, ax=right, label="1 − cos after the last layer")
    right.set_yticks(range(len(found.doses)), [f"{theta:g}" for theta in found.doses])
    ticks = range(0, len(found.windows), max(1, len(found.windows) // 9))
    right.set_xticks(ticks, [f"{a}–{b}" for a, b in found.windows[list(ticks)]], rotation=45)
    right.set_xlabel("injection window, layers")
    right.set_ylabel("dose θ, radians")
    right.set_title(f"site {found.sites[s]}: what is left in the end")
    return picture


def _norm(values: np.ndarray):
    """Colours by powers of ten, down to a 10,000th of the largest value; 0 is as the least."""
    from matplotlib.colors import LogNorm

    most = float(np.nanmax(values, initial=0)) or 1.0
    return LogNorm(
        max(most * 1e-4, float(np.nanmin(values[values > 0], initial=most)) * 0.999), most, clip=True
    )


def _window(found: Vergence) -> str:
    widths = set((found.windows[:, 1] - found.windows[:, 0] + 1).tolist())
    return f"{widths.pop()} layers" if len(widths) == 1 else "from layer 0 on"
