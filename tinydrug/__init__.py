"""LLM inference on the CPU in NumPy and Numba, with noise in the attention vectors as a first-class citizen.

    import tinydrug
    engine = tinydrug.load("smollm2-135m")
    print(engine.chat([{"role": "user", "content": "Tell me about the sea."}], drug="V:0.05").text)

Importing this does nothing else: no compilation, no threads, no output. Names are loaded when first used.
"""

import importlib

__version__ = "0.1.0"

_HOME = {
    "load": "loading",
    "inspect": "loading",
    "quantize": "loading",
    "Inspection": "loading",
    "Engine": "api",
    "Stream": "api",
    "Step": "api",
    "Completion": "api",
    "Score": "api",
    "Session": "engine.session",
    "Record": "engine.record",
    "Sampling": "engine.sampling",
    "register_law": "engine.custom",
    "Schedule": "noise",
    "Dose": "noise",
    "SOBER": "noise",
    "load_schedule": "noise",
    "save_schedule": "noise",
    **dict.fromkeys(
        (
            "TinydrugError",
            "ModelNotFound",
            "BadModelFile",
            "UnsupportedModel",
            "ConfigError",
            "DrugError",
            "PromptError",
            "ContextOverflow",
            "NumericalError",
            "DownloadError",
        ),
        "errors",
    ),
}
__all__ = [*_HOME, "__version__"]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
