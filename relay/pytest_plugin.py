"""The pytest plugin: fixtures that connect clients to the application under test.

    @pytest.fixture
    def relay_app() -> FastAPI:
        return app

    def test_new_message(relay_socket: BlockingSocket) -> None:
        room = relay_socket.join("room:1")

Owns the fixtures' names. What it needs is imported when a fixture is used: pytest loads this in every project.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from relay.testing import BlockingSocket, Connecting


@pytest.fixture
def relay_app() -> Any:
    """What is tested: override it by a fixture that returns your `Relay`, or the application it is mounted in."""
    raise pytest.UsageError(
        "relay_app: expected a fixture of this name in your conftest.py, which returns your Relay, or the application "
        "it is mounted in"
    )


@pytest.fixture
def relay_connect(relay_app: Any) -> "Callable[..., Connecting]":
    """`relay.testing.connect` for the application: ``async with relay_connect(user="alice")``, or ``with``."""
    from relay.testing import connect

    return partial(connect, relay_app)


@pytest.fixture
def relay_socket(relay_connect: "Callable[..., Connecting]") -> "Iterator[BlockingSocket]":
    """A connected client, for tests without an event loop."""
    with relay_connect() as socket:
        yield socket
