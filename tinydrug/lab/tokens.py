"""Next-token likelihoods, sober and drugged, as words and bars."""

import numpy as np

from tinydrug.text.tokenizer import Tokenizer

COMMON, SHORTFALL, EXCESS = "|", "-", "+"


def shown(tokenizer: Tokenizer, token: int) -> str:
    """A token on its own, on one line: spaces as ␣, line ends as ↵, bytes that are no character as �."""
    text = tokenizer.token_bytes(token).decode("utf-8", "replace") or tokenizer.token_text(token)
    plain = text.replace("\n", "↵").replace("\t", "⇥")
    return "".join(c if c.isprintable() else "�" for c in plain).replace(" ", "␣")


def bar(sober: float, drugged: float, width: int, full: float = 1.0) -> tuple[str, str]:
    """Two likelihoods as one bar of at most `width` characters, `full` being all of them: what they have in
    common as |, then what the drugged one lacks as - or has in excess as + -> the two parts."""
    s, d = (round(min(p / full, 1) * width) for p in (sober, drugged))
    return COMMON * min(s, d), SHORTFALL * (s - d) if s > d else EXCESS * (d - s)


def likeliest(p: np.ndarray, k: int) -> np.ndarray:
    """The k likeliest tokens of p (V,), best first, the lower id first among equals."""
    return np.argsort(-p, kind="stable")[:k]
