"""What noise does to a vector: the law of its direction, the form of the move, the law of the angle."""

from dataclasses import dataclass

from tinydrug.kernels.laws import LAWS as KERNELS


@dataclass(frozen=True)
class Choice:
    """One entry: `code` is its number in a schedule's table, `mark` its spelling in a dose's text."""

    code: int  # never given to another entry: records refer to it
    mark: str  # empty for the default
    what: str


LAWS = {  # mark after the dose, ~LAW
    name: Choice(entry.code, f"~{name}" if entry.code else "", entry.what) for name, entry in KERNELS.items()
}

FORMS = {  # mark before the site
    "rotation": Choice(0, "", "turned by the angle phi, the norm kept"),
    "L2": Choice(1, "L2", "x + phi |x| r/|r|, the norm not kept"),
    "NL": Choice(2, "NL", "x + phi |x| o/|o| scaled back to |x|: turned by arctan(phi)"),
}

ANGLES = {  # mark after the site
    "uniform": Choice(0, "", "phi is U[0, theta)"),
    "normal": Choice(1, "n", "phi is |N(0, theta)|"),
}

KINDS = {"law": LAWS, "form": FORMS, "angle": ANGLES}  # by the field of a dose and of a table
