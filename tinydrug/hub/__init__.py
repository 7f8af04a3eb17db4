"""From a name to a model on disk: a path, a known name, the Hugging Face cache, or a download."""

from tinydrug.hub.resolve import Resolved, resolve
from tinydrug.hub.table import home

__all__ = ["Resolved", "home", "resolve"]
