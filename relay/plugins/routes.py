"""The routes of a router, one by one, however they were included.

Must not know FastAPI: a router is what has ``routes``.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

_PARAMETER = re.compile(r"\{(\w+)(?::(\w+))?\}")


def flat_routes(routes: Iterable[Any], prefix: str = "") -> Iterator[tuple[str, set[str]]]:
    """Path and methods of each route; without methods for what is mounted.

    FastAPI copies the routes of a router that is included, or, in later versions, keeps the router.
    """
    for route in routes:
        inner = getattr(route, "original_router", None)
        if inner is not None:
            context = getattr(route, "include_context", None)
            yield from flat_routes(inner.routes, prefix + getattr(context, "prefix", ""))
        elif (path := getattr(route, "path", None)) is not None:
            yield prefix + path, set(getattr(route, "methods", None) or ())


def describe_route(path: str, methods: set[str]) -> str:
    """A route with its methods, for people."""
    return " ".join(part for part in (",".join(sorted(methods)), path) if part)


def sample_path(path: str, text: str = "x") -> str:
    """A path that a route with parameters answers: ``/rooms/{id:int}`` is ``/rooms/1``.

    Args: text: what stands for a parameter of any text.
    """
    values = {"int": "1", "float": "1.5", "uuid": "00000000-0000-0000-0000-000000000000"}
    return _PARAMETER.sub(lambda found: values.get(found[2] or "", text), path)
