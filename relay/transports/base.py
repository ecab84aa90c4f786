"""What every transport has in common: the types of ASGI."""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias

Scope: TypeAlias = MutableMapping[str, Any]

ReceiveCallable: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]

SendCallable: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]
