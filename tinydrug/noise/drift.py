"""Drift and diffusion, the terms of drift-diffusion GPT-2: attention's output scaled, noise added to it."""

from dataclasses import dataclass

import numpy as np

from tinydrug.errors import DrugError
from tinydrug.noise.checks import at, number, read_number, shown, write_number
from tinydrug.noise.sites import SITES
from tinydrug.noise.where import Where, parse_where

TERMS = ("drift", "diffusion")  # fields of a schedule, and what stands before the colon in its text
COUNTED = (*SITES, *TERMS)  # what vectors that were moved are counted by
KINDS = {  # columns of a table of terms, and what attention's output x becomes
    "drift": "x + drift x",
    "diffusion": "x + diffusion N(0, 1)",
    "learned": "x + learned std N(0, 1), std from the checkpoint",
}
TABLE = np.dtype([(kind, "f8") for kind in KINDS])


@dataclass(frozen=True)
class Term:
    """What becomes of each component x of attention's output in the layers of `where` (None: all).

    `kind` is a key of KINDS. `amount` is a share for drift, a standard deviation for diffusion, and 1 for
    learned, a diffusion whose standard deviations the checkpoint brings. `str` gives the text that
    `parse_term` reads. Raises DrugError.
    """

    kind: str
    amount: float = 1.0
    where: Where | None = None

    def __post_init__(self):
        if self.kind not in KINDS:
            raise DrugError(f"there is no kind of term {shown(self.kind)}, only {', '.join(KINDS)}")
        least = {"least": 0.0} if self.kind != "drift" else {}
        object.__setattr__(self, "amount", number(self.amount, self.name, **least))
        if self.kind == "learned" and self.amount != 1:
            raise DrugError("a learned diffusion has no amount: scale the schedule")
        if self.where is not None and not isinstance(self.where, Where):
            raise DrugError(f"where must be Layers, Depth or Profile, not {shown(self.where)}")

    @property
    def name(self) -> str:
        """drift or diffusion."""
        return "drift" if self.kind == "drift" else "diffusion"

    @property
    def peak(self) -> float:
        """The largest amount any layer can get, without its sign."""
        return abs(self.amount) * (1.0 if self.where is None else self.where.peak)

    def amounts(self, n_layers: int, scale: float = 1.0) -> np.ndarray:
        """The amount of every layer, (L,). Raises DrugError when the term does not fit the model."""
        with at(shown(str(self))), np.errstate(over="ignore", invalid="ignore"):
            ratios = np.ones(n_layers) if self.where is None else self.where.ratios(n_layers)  # (L,)
            if self.peak > 0 and not ratios.any():  # sober output would pass for a result
                raise DrugError(f"reaches no layer: layer l of this model lies at depth l/{n_layers}")
            amounts = ratios * self.amount * scale
            if not (np.abs(amounts) <= np.finfo("f4").max).all():
                raise DrugError("grows beyond what a float32 holds: lower it or the scale")
            return amounts

    @property
    def value(self) -> str:
        """Its text without the name: 0.1@8-15."""
        amount = "learned" if self.kind == "learned" else write_number(self.amount)
        return amount + ("" if self.where is None else f"@{self.where}")

    def __str__(self) -> str:
        return f"{self.name}:{self.value}"


def parse_term(text: str) -> Term:
    """`drift:GAIN[@WHERE]`, `diffusion:STD[@WHERE]`, for instance drift:-0.2@8-15, diffusion:0.1@0.3..0.5.

    In place of STD: `learned`, the standard deviations of a drift-diffusion checkpoint; `off`; `std:0.1`,
    the same as 0.1. WHERE is as in a dose. Raises DrugError.
    """
    with at(shown(text.strip())):
        rest, at_sign, where = text.partition("@")
        name, _, amount = (part.strip().lower() for part in rest.partition(":"))
        where = parse_where(where.strip()) if at_sign else None
        if name == "drift":
            return Term("drift", read_number(amount, "drift"), where)
        if name != "diffusion":
            raise DrugError(f"there is no term {shown(name)}, only {', '.join(TERMS)}")
        if amount in MODES:
            return Term(*MODES[amount], where)
        amount = amount.removeprefix("std:")
        if amount and not any(char.isdigit() for char in amount):
            raise DrugError(
                f"diffusion is {', '.join(MODES)} or a standard deviation such as 0.1, not {amount}"
            )
        return Term("diffusion", read_number(amount, "diffusion"), where)


def as_term(name: str, value: "Term | str | float | None") -> Term | None:
    """A term as a field of a schedule may give it: itself, its text with or without the name, its amount."""
    if isinstance(value, str):
        head = value.partition("@")[0].partition(":")[0].strip().lower()
        value = parse_term(value if head in TERMS else f"{name}:{value}")
    elif value is not None and not isinstance(value, Term):
        value = Term(name, value)
    if value is not None and value.name != name:
        raise DrugError(f"{name} cannot be {value}")
    return value


MODES = {"off": ("diffusion", 0.0), "learned": ("learned", 1.0)}  # kind and amount
