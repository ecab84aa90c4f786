"""What may be a handler: whether it can be called as its hook calls it, and whether that gives a coroutine.

Owns the look at functions; must not know hooks.
"""

from collections.abc import Callable
from functools import partial
from inspect import isasyncgenfunction, iscoroutinefunction, isgeneratorfunction, signature, unwrap
from typing import Any

Handler = Callable[..., Any]


def is_async(function: Handler) -> bool:
    """Whether calling ``function`` gives a coroutine: also of a partial, a static method, an object with ``__call__``.

    What it says of a plain function that returns an awaitable is False: only its call tells.
    """
    while isinstance(function, partial | staticmethod):
        function = function.func if isinstance(function, partial) else function.__func__
    return iscoroutinefunction(function) or iscoroutinefunction(getattr(type(function), "__call__", None))  # noqa: B004


def check_handler(what: str, function: object, *parameters: str) -> None:
    """Check that ``function`` can be called as a handler is. Raises TypeError, which names it and its place.

    Args: what: the hook, or another name for what it is.
          parameters: the names of what it is given.
    """
    given = ", ".join(parameters)
    if not callable(function):
        raise TypeError(f"{what}: expected a function handler({given}), got {function!r:.200}")
    named = f"{what}: {_place_of(function)}"
    if isinstance(function, type):
        raise TypeError(f"{named} is a class; expected a function handler({given}), or an object that can be called")
    called: Handler = function
    while isinstance(called, partial | staticmethod):
        called = called.func if isinstance(called, partial) else called.__func__
    for one in (called, getattr(type(called), "__call__", None)):  # noqa: B004
        if isgeneratorfunction(one) or isasyncgenfunction(one):
            raise TypeError(f"{named} has a yield, so that calling it runs nothing; expected a return")
    try:
        shape = signature(function)
    except (ValueError, TypeError):  # of a function in C, which does not say
        return
    try:
        _ = shape.bind(*parameters)
    except TypeError as error:
        raise TypeError(f"{named} cannot be called as handler({given}): {error}") from None


def _place_of(function: Handler) -> str:
    """A function's name, and its file and line where it has them."""
    shown = getattr(function, "__qualname__", None) or f"{function!r:.200}"
    code = getattr(unwrap(function), "__code__", None)
    return f"{shown} ({code.co_filename}:{code.co_firstlineno})" if code else shown
