"""What the angle between x and x' should be on average: the measure of `--verify-noise`."""

import numpy as np

from tinydrug.noise.schedule import Schedule
from tinydrug.noise.sites import SITES


def mean_angle(theta: float, form: str, angle: str, law: str) -> float | None:
    """Expected angle in radians for a dose that does not fade; None where it depends on the vectors.

    Rotation: phi, folded into [0, pi]. NL: arctan(phi). L2 adds a direction as it comes: for an isotropic law
    that is arctan(phi) up to 1/d, for the one-sided uniform law it depends on x.
    """
    share = (np.arange(20_000) + 0.5) / 20_000
    if angle == "normal":  # |N(0, theta)| by its density up to 8 standard deviations
        phi = theta * 8 * share
        weight = np.exp(-0.5 * (phi / theta) ** 2)
    else:
        phi, weight = theta * share, np.ones_like(share)
    if form == "rotation":
        turned = np.abs((phi + np.pi) % (2 * np.pi) - np.pi)
    elif form == "L2" and law not in ("gauss", "sign"):
        return None
    else:
        turned = np.arctan(phi)
    return float((turned * weight).sum() / weight.sum())


def expected_angles(schedule: Schedule, n_layers: int) -> dict[str, float | None]:
    """By dosed site: the mean over its dosed layers; None where it cannot be told beforehand."""
    table, out = schedule.table(n_layers)["theta"], {}
    for dose in schedule.doses:
        thetas = table[:, SITES[dose.site].code]
        thetas = thetas[thetas > 0]
        if not thetas.size:
            continue
        angles = [mean_angle(theta, dose.form, dose.angle, dose.law) for theta in thetas]
        known = dose.time.ramp == "constant" and None not in angles
        out[dose.site] = float(np.mean(angles)) if known else None
    return out
