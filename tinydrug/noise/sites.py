"""The places in a transformer block where noise may enter, one letter each."""

from dataclasses import dataclass

from tinydrug.errors import DrugError
from tinydrug.noise.checks import shown


@dataclass(frozen=True)
class Site:
    """One place: `code` is its column in a schedule's table and its number in the noise generator's key."""

    letter: str
    code: int
    array: str  # what is moved
    when: str
    cached: str  # does the key-value cache keep the noise?

    def __str__(self) -> str:
        return f"{self.letter} ({self.array}, {self.when})"


def find_site(letter: str) -> Site:
    """The site of this letter, in any case. Raises DrugError for the residual stream and the unknown."""
    name = letter.strip().lower() if isinstance(letter, str) else None
    if name in RESIDUAL:
        raise DrugError(
            "noise never enters the residual stream: it would stay in the sum that every later layer reads; "
            "dose H, the normed copy of it that a block reads"
        )
    for known, site in SITES.items():
        if known.lower() == name:
            return site
    raise DrugError(f"there is no site {shown(letter)}; the sites are {'; '.join(map(str, SITES.values()))}")


RESIDUAL = frozenset({"r", "resid", "residual"})

SITES = {
    site.letter: site
    for site in (
        Site("H", 0, "normed block input", "before q, k, v", "yes, through k and v of this layer"),
        Site("Q", 1, "query heads", "before RoPE", "only through deeper layers"),
        Site("pK", 2, "new key heads", "before RoPE and cache", "yes"),
        Site("K", 3, "cached key heads", "at each read, after RoPE", "never: a read leaves it as it was"),
        Site("V", 4, "cached value heads", "at each read", "never: a read leaves it as it was"),
        Site("A", 5, "attention output heads", "before o_proj", "only through deeper layers"),
        Site("M", 6, "MLP activations", "before down_proj", "only through deeper layers"),
    )
}
