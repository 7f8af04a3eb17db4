"""Direction laws of one's own: a Numba function from Python that works at every site, as reproducibly."""

import re
from collections.abc import Callable

from tinydrug.errors import DrugError
from tinydrug.kernels.laws import of_function
from tinydrug.kernels.noise import LAWS as KERNELS
from tinydrug.kernels.noise import make_law
from tinydrug.noise.laws import LAWS, Choice

FIRST_CODE = 64  # codes below belong to laws that come with the package


def register_law(name: str, component: Callable[[float], float], what: str = "") -> None:
    """Make `~name` a direction law: component(u), with u from U[0, 1), draws each component of a direction.

    component: a function Numba can compile (jitted or plain), float32 to float. It is compiled when first
    used, in every process. Records name the law; to replay one, register the same function under the same
    name. Raises DrugError for a name that is taken or no name.

        tinydrug.register_law("spiky", lambda u: (2 * u - 1) ** 5)
        engine.generate("The sea", drug="A:0.3~spiky")
    """
    if not isinstance(name, str) or not re.fullmatch("[a-z][a-z0-9_]{0,31}", name):
        raise DrugError(f"a law's name is lower-case letters, digits and _, not {name!r}")
    if name in LAWS:
        raise DrugError(f"there is a law {name!r} already")
    if not callable(component):
        raise DrugError(f"law {name}: component must be a function of one number, not {component!r}")
    law = of_function(component)
    KERNELS[name] = tuple(make_law(name, law, wandering=w, cached=False) for w in (False, True))
    code = max([FIRST_CODE, *(choice.code + 1 for choice in LAWS.values())])
    LAWS[name] = Choice(code, f"~{name}", what or "registered by the caller")
