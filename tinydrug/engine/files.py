"""Files that appear whole or not at all."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tinydrug.errors import ConfigError


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[str]:
    """The name of a file to write; it takes the place of `path` when the block ends well, else it is removed.

    ConfigError naming `path` if the disk does not take it.
    """
    try:
        target = os.path.realpath(path)
        partial = f"{target}.{os.getpid()}-{threading.get_ident()}.partial"
        try:
            yield partial
            with open(partial, "rb") as file:
                os.fsync(file.fileno())  # the name must not reach the disk before the content
            os.replace(partial, target)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(partial)
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{os.fspath(path)}: cannot be written: {reason}", "path") from None
