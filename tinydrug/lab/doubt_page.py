"""The page of a doubt measurement: the answer as a heat map, token by token, and what each noise answered."""

from tinydrug.lab.doubt import KINDS, Doubt
from tinydrug.lab.page import page, parts


def doubt_page(found: Doubt, prompt: str) -> str:
    """The page as text."""
    data = {
        "kinds": KINDS,
        "tokens": found.rows(),
        "answers": found.answers,
        "entropy": found.entropy,
        "prompt": prompt,
        "record": found.record,
    }
    body, script, style = parts("doubt")
    return page("Doubt: how sure the model is, told by noise", body, script, data, style=style)
