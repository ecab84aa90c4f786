from asyncio import Transport
from asyncio.trsock import TransportSocket

def send_to_each(
    transports: tuple[Transport, ...], sockets: tuple[TransportSocket, ...], start: int, stop: int, data: bytes, /
) -> list[tuple[int, int]] | None: ...
