"""The formatters of the log under their former dotted path; they are in `relay.log`."""

import warnings
from typing import Any

from relay import log

_FORMATTERS = ("JsonFormatter", "TextFormatter")


def __getattr__(name: str) -> Any:
    """Find a formatter, with a DeprecationWarning. Raises AttributeError for any other name."""
    if name in _FORMATTERS:
        warnings.warn(f"relay.logs.{name} is now relay.log.{name}", DeprecationWarning, stacklevel=2)
        return getattr(log, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
