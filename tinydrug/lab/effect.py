"""The axis on which sites and laws can be compared: how far each condition moves next-token distributions."""

import time
from collections.abc import Mapping

import numpy as np

from tinydrug.api import Engine
from tinydrug.engine.calibrate import effects
from tinydrug.lab.plan import Plan
from tinydrug.lab.progress import Progress
from tinydrug.noise import Schedule

TOKENS = 256  # of the reference text: a mean within a few per cent
GROUP = 15  # schedules read at once


def kl(engine: Engine, plan: Plan, known: Mapping[str, float], progress: Progress) -> dict[str, float]:
    """Mean KL(sober || drugged) in nats a token on a reference text, everything read under noise, by drug;
    what is known is not measured again. A KeyboardInterrupt that progress raises leaves the rest unknown."""
    drugs = dict.fromkeys(each.drug for each in plan.conditions if not Schedule.parse(each.drug).is_sober)
    found = {drug: known[drug] for drug in drugs if drug in known}
    todo, start, total = [drug for drug in drugs if drug not in found], time.monotonic(), len(drugs)
    pieces = [engine.pieces()[0][:TOKENS]]
    try:
        for at in range(0, len(todo), GROUP):
            left = (time.monotonic() - start) / at * (len(todo) - at) if at else float("nan")
            progress(len(found), total, left)
            some = todo[at : at + GROUP]
            values = effects(engine.runtime, pieces, [engine.resolve(drug) for drug in some])
            found |= {drug: float(np.mean(v[0])) for drug, v in zip(some, values, strict=True)}
    except KeyboardInterrupt:
        pass
    return found
