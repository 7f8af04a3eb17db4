"""What noise does to a vector: the law of its direction, the form of the move, the law of the angle."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Choice:
    """One entry: `code` is its number in a schedule's table, `mark` its spelling in a dose's text."""

    code: int  # never given to another entry: records refer to it
    mark: str  # empty for the default
    what: str


LAWS = {  # mark after the dose, ~LAW
    "uniform": Choice(0, "", "components U[0, 1), one-sided, as published"),
}

FORMS = {  # mark before the site
    "rotation": Choice(0, "", "turned by the angle, the norm kept"),
}

ANGLES = {  # mark after the site
    "uniform": Choice(0, "", "U[0, theta)"),
}

KINDS = {"law": LAWS, "form": FORMS, "angle": ANGLES}  # by the field of a dose and of a table
