"""The listener of `relay serve`."""

import asyncio
import socket

import pytest

from relay import Config, ConfigError
from relay.cli.serve import _listen


async def test_connections_send_without_delay_on_asyncio_too() -> None:
    """asyncio sets TCP_NODELAY only on sockets that know their protocol."""
    accepted: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    class Accepting(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            connection = transport.get_extra_info("socket")
            accepted.set_result(bool(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)))

    with _listen(Config(port=0)) as listener:
        server = await asyncio.get_running_loop().create_server(Accepting, sock=listener)
        async with server:
            _, writer = await asyncio.open_connection(*listener.getsockname())
            assert await accepted
            writer.close()
            await writer.wait_closed()


def test_address_that_is_taken_is_an_error_of_the_settings() -> None:
    with _listen(Config(port=0)) as taken:
        taken.listen()
        with pytest.raises(ConfigError, match="cannot listen"):
            _listen(Config(port=taken.getsockname()[1]))
