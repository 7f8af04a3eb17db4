"""One dose: how much noise of which law enters at one site, and in which layers."""

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tinydrug.errors import DrugError
from tinydrug.noise.checks import at, find, number, read_number, shown, write_number
from tinydrug.noise.laws import ANGLES, FORMS, KINDS, LAWS, Choice
from tinydrug.noise.sites import SITES, find_site
from tinydrug.noise.time import FIELDS, FRESH, RAMPS, RENEWALS, Time, parse_time
from tinydrug.noise.where import Where, parse_where, where_from_dict

log = logging.getLogger("tinydrug")

HEAD = re.compile(rf"([a-z][a-z0-9])?({'|'.join(SITES)})([a-z])?", re.ASCII | re.IGNORECASE)
KEYS = ("site", "theta", "layers", "depth", "profile", "mode", *KINDS, *FIELDS)


@dataclass(frozen=True)
class Effect:
    """In place of an angle: whichever has this effect on the model, a mean KL(sober||drugged) of `kl` nats a
    token. `Engine.resolve` finds it. Raises DrugError."""

    kl: float

    def __post_init__(self):
        object.__setattr__(self, "kl", number(self.kl, "kl", least=0))

    def __str__(self) -> str:
        return f"kl={write_number(self.kl)}"


@dataclass(frozen=True)
class Dose:
    """Noise of at most `theta` radians at `site`, in the layers of `where` (None: all).

    `theta` is one angle, or a tuple with one angle a layer from layer 0 on: layers after it get none, and
    `where` must be None; or an Effect, until the model is known. `str` gives the text that `parse_dose`
    reads. Raises DrugError; warns above pi.
    """

    site: str
    theta: float | tuple[float, ...] | Effect
    where: Where | None = None
    law: str = "uniform"
    form: str = "rotation"
    angle: str = "uniform"
    time: Time = FRESH

    def __post_init__(self):
        object.__setattr__(self, "site", find_site(self.site).letter)
        object.__setattr__(self, "theta", _checked_theta(self.theta))
        for kind, registry in KINDS.items():
            object.__setattr__(self, kind, find(registry, getattr(self, kind), kind))
        if not isinstance(self.time, Time):
            raise DrugError(f"time must be a Time, not {shown(self.time)}")
        if self.where is not None and not isinstance(self.where, Where):
            raise DrugError(f"where must be Layers, Depth or Profile, not {shown(self.where)}")
        if self.where is not None and isinstance(self.theta, tuple):
            raise DrugError("one theta a layer already says where: drop the layers, depth or profile")
        if not self.is_open and self.peak > math.pi:
            log.warning("drug %s: %.4g rad is above pi, half a turn", self.head, self.peak)

    @property
    def is_open(self) -> bool:
        """Whether its angle is yet to be found."""
        return isinstance(self.theta, Effect)

    @property
    def peak(self) -> float:
        """The largest theta any layer can get, in radians; infinite while it is open."""
        if self.is_open:
            return math.inf if self.theta.kl else 0.0
        if isinstance(self.theta, tuple):
            return max(self.theta)
        return self.theta * (1.0 if self.where is None else self.where.peak)

    @property
    def head(self) -> str:
        """Form, site and angle as the text spells them: V, and with other marks L2pKn."""
        return f"{FORMS[self.form].mark}{self.site}{ANGLES[self.angle].mark}"

    def thetas(self, n_layers: int, scale: float = 1.0) -> np.ndarray:
        """Theta of every layer in radians, (L,). Raises DrugError when the dose does not fit the model."""
        with at(f"drug {shown(str(self))}"), np.errstate(over="ignore", invalid="ignore"):
            thetas = self._thetas(n_layers) * scale
            if not (thetas <= np.finfo("f4").max).all():
                raise DrugError("theta grows beyond what a float32 holds: lower it or the scale")
            return thetas

    def _thetas(self, n_layers: int) -> np.ndarray:
        if self.is_open:
            raise DrugError("its angle is found on a loaded model: Engine.resolve")
        if isinstance(self.theta, tuple):
            if len(self.theta) > n_layers:
                raise DrugError(f"gives theta of {len(self.theta)} layers, the model has {n_layers}")
            return np.pad(self.theta, (0, n_layers - len(self.theta)))
        if self.where is None:
            return np.full(n_layers, self.theta)
        ratios = self.where.ratios(n_layers)  # (L,)
        if self.peak > 0 and not ratios.any():  # sober output would pass for a result
            raise DrugError(f"reaches no layer: layer l of this model lies at depth l/{n_layers}")
        return ratios * self.theta

    def to_dict(self) -> dict:
        """Plain data with the keys of a drug file; `from_dict` reads it."""
        theta = list(self.theta) if isinstance(self.theta, tuple) else self.theta
        theta = str(theta) if self.is_open else theta
        where = {} if self.where is None else self.where.to_dict()
        kinds = {kind: getattr(self, kind) for kind in KINDS}
        return {"site": self.site, "theta": theta, **where, **kinds, **self.time.to_dict()}

    @classmethod
    def from_dict(cls, fields: Mapping) -> "Dose":
        """A dose from the keys of a drug file: site, theta and any other of KEYS. Raises DrugError."""
        if not isinstance(fields, Mapping):
            raise DrugError(f"must be a table, not {shown(fields)}")
        for key in fields:
            if key not in KEYS:
                raise DrugError(f"unknown key {shown(key)}: a dose has {', '.join(KEYS)}")
        for key in ("site", "theta"):
            if key not in fields:
                raise DrugError(f"{key} is missing")
        theta = fields["theta"]
        if isinstance(theta, str):
            theta = parse_theta(theta)
        kinds = {kind: fields[kind] for kind in KINDS if kind in fields}
        time = Time(**{name: fields[name] for name in FIELDS if name in fields})
        return cls(fields["site"], theta, where_from_dict(fields), time=time, **kinds)

    def __str__(self) -> str:
        if isinstance(self.theta, tuple):
            theta = "/".join(map(write_number, self.theta))
            theta += "/" * (len(self.theta) == 1)  # tells layer 0 alone from one theta for all layers
        else:
            theta = str(self.theta) if self.is_open else write_number(self.theta)
        where = "" if self.where is None else f"@{self.where}"
        law, time = LAWS[self.law].mark, str(self.time)
        if time:
            law = f"{law}+{time}" if law else f"~{time}"
        return f"{self.head}:{theta}{where}{law}"


def parse_dose(text: str) -> Dose:
    """`[L2|NL]SITE[n]:THETA[@WHERE][~LAW]`, for instance V:0.05, pK:3deg@8-15, A:0.1@0.3..0.5~gauss+held.

    THETA is in radians unless it ends in `deg`; angles by slashes (0/0/0.05) are one a layer from layer 0 on;
    kl=0.05 is whatever angle makes the model's next-token distributions differ so much from sober ones.
    WHERE is layers (8, 8-15, 8-9+20), a depth (0.3..0.5), a profile (DEPTH:PEAKRATIO/.../MODE)
    or a preset (readme, samples, slowfall, single:8, stack:8).
    After ~, by plus signs: the law, held or wander:TOKENS, cosine:TOKENS or linear:TOKENS, tied.
    Raises DrugError.
    """
    text = text.strip()
    if not text:
        raise DrugError("an empty drug: write SITE:THETA, for instance V:0.05")
    with at(f"drug {shown(text)}"):
        rest, tilde, law = text.partition("~")
        rest, at_sign, where = rest.partition("@")
        head, colon, theta = rest.partition(":")
        form, site, angle = parse_head(head.strip())
        if not colon:
            raise DrugError("theta is missing: write SITE:THETA, for instance V:0.05")
        where = parse_where(where.strip()) if at_sign else None
        words = [word.strip() for word in law.split("+")] if tilde else ["uniform"]
        named = words[0].lower() in LAWS or not _is_time(words[0])
        law, times = (words[0], words[1:]) if named else ("uniform", words)
        return Dose(site, parse_theta(theta), where, law, form, angle, parse_time(times))


def _is_time(word: str) -> bool:
    """Whether a word after ~ is about time, so that the law before it was left out."""
    return word.partition(":")[0].strip().lower() in (*RENEWALS, *RAMPS, "tied")


def parse_head(head: str) -> tuple[str, str, str]:
    """`L2pKn` -> the names of form, site and angle. Raises DrugError with what there is."""
    match = HEAD.fullmatch(head)
    form, site, angle = match.groups(default="") if match else ("", head, "")
    site = find_site(site).letter
    return (
        _by_mark(FORMS, form, f"there is no form {form!r} before site {site}"),
        site,
        _by_mark(ANGLES, angle, f"there is no angle {angle!r} after site {site}"),
    )


def _by_mark(registry: Mapping[str, Choice], mark: str, refusal: str) -> str:
    for name, choice in registry.items():
        if choice.mark.lower() == mark.lower():
            return name
    known = [f"{name} ({choice.mark or 'no mark'}: {choice.what})" for name, choice in registry.items()]
    raise DrugError(f"{refusal}, only {', '.join(known)}")


def parse_theta(text: str) -> float | tuple[float, ...] | Effect:
    """`0.05`, `3deg`, or angles by slashes, one a layer -> radians; `kl=0.05` -> Effect. Raises DrugError."""
    name, equals, value = text.partition("=")
    if equals:
        if name.strip().lower() != "kl":
            raise DrugError(f"theta {shown(text)} is not a number; by its effect it is written kl=0.05")
        return Effect(read_number(value, "kl", least=0))
    if "/" in text:
        return tuple(_parse_angle(part) for part in text.strip().removesuffix("/").split("/"))
    return _parse_angle(text)


def _parse_angle(text: str) -> float:
    text = text.strip()
    if text.endswith("deg"):
        return math.radians(read_number(text.removesuffix("deg"), "theta", least=0))
    return read_number(text, "theta", least=0)


def _checked_theta(theta) -> float | tuple[float, ...] | Effect:
    if isinstance(theta, Effect):
        return theta
    if not isinstance(theta, (tuple, list, np.ndarray)):
        return number(theta, "theta", least=0)
    if len(theta) == 0:
        raise DrugError("theta is an empty list: give one theta a layer")
    return tuple(number(value, f"theta of layer {i}", least=0) for i, value in enumerate(theta))
