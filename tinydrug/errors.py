"""The errors a caller can meet: one small typed tree, each with the fields that name what is wrong.

Every message is one line that names the file, tensor, field or flag and says what to do. `exit_status` is
what the command exits with: 2 for bad input, 1 for a failure at run time.
"""


class TinydrugError(Exception):
    """Base of every error this package raises on purpose."""

    exit_status = 2


class ModelNotFound(TinydrugError, FileNotFoundError):
    """No model by this name: `searched` lists the places, in order."""

    def __init__(self, message: str, name: str = "", searched: tuple[str, ...] = ()):
        super().__init__(message)
        self.name, self.searched = name, tuple(searched)

    def __str__(self) -> str:  # FileNotFoundError would print its errno form
        return str(self.args[0])


class BadModelFile(TinydrugError, ValueError):
    """A model file is damaged or inconsistent: `path`, `tensor` (may be empty), `reason`."""

    def __init__(self, path, reason: str, tensor: str = ""):
        super().__init__(f"{path}: {f'tensor {tensor}: ' if tensor else ''}{reason}")
        self.path, self.tensor, self.reason = str(path), tensor, reason


class UnsupportedModel(TinydrugError, NotImplementedError):
    """A sound checkpoint of a kind this engine does not run."""


class ConfigError(TinydrugError, ValueError):
    """An option or a field of a configuration has a value that makes no sense: `field` names it."""

    def __init__(self, message: str, field: str = ""):
        super().__init__(message)
        self.field = field


class DrugError(TinydrugError, ValueError):
    """A noise specification or file is wrong."""


class PromptError(TinydrugError, ValueError):
    """A prompt that cannot be fed: empty, not UTF-8, a token id out of range."""


class ContextOverflow(TinydrugError, ValueError):
    """The prompt does not fit: `n_prompt` tokens into a context of `n_ctx`."""

    def __init__(self, n_prompt: int, n_ctx: int, hint: str = "raise --ctx-size or shorten the prompt"):
        super().__init__(f"the prompt has {n_prompt} tokens, the context holds {n_ctx}: {hint}")
        self.n_prompt, self.n_ctx = n_prompt, n_ctx


class NumericalError(TinydrugError, ArithmeticError):
    """The model computed NaN or infinity; nothing is sampled from it."""

    exit_status = 1


class DownloadError(TinydrugError, OSError):
    """A download failed or brought something other than what was asked for."""

    exit_status = 1

    def __str__(self) -> str:
        return str(self.args[0])
