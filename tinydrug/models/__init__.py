"""One file an architecture. MODELS maps config.json's model_type to the module that has it."""

from types import ModuleType

from tinydrug.errors import UnsupportedModel
from tinydrug.models import dd_gpt2, gpt2, llama

MODELS: dict[str, ModuleType] = {
    "llama": llama,
    "mistral": llama,
    "gpt2": gpt2,
    "dd-gpt2": dd_gpt2,
}


def find_model(raw: dict, path) -> ModuleType:
    """The module for a config.json; UnsupportedModel lists what there is."""
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in MODELS:
        raise UnsupportedModel(
            f"{path}: model_type {kind!r} is not supported; supported: {', '.join(MODELS)}"
        )
    return MODELS[kind]
