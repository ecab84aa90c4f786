"""The proxy's own arithmetic: which part of a path is forwarded, whatever the server says about it."""

from typing import Any

import pytest

from relay.config_sections import ProxyConfig
from relay.web.proxy import Proxy, _split


def scope(path: str, root_path: str, raw_path: bytes | None) -> dict[str, Any]:
    """What Starlette makes of a request on its way to a mount."""
    return {"type": "http", "path": path, "root_path": root_path, "raw_path": raw_path}


@pytest.mark.parametrize(
    ("path", "root_path", "raw_path", "expected"),
    [
        ("/api/x/a", "/api/x", b"/api/x/a", ("/api/x", b"/a")),
        ("/api/x/", "/api/x", b"/api/x/", ("/api/x", b"/")),
        ("/api/x", "/api/x", b"/api/x", ("/api/x", b"")),
        ("/api/x/a/b c", "/api/x", b"/api/x/a%2Fb%20c", ("/api/x", b"/a%2Fb%20c")),
        ("/api/x/%2F", "/api/x", b"/api/x/%252F", ("/api/x", b"/%252F")),
        ("/api/x/api/x", "/api/x", b"/api/x/api/x", ("/api/x", b"/api/x")),
        ("/api/x/api/x", "/api/x", b"/%61pi/%78/api/x", ("/api/x", b"/api/x")),
        ("/äpi/x/ü", "/äpi/x", b"/%C3%A4pi/x/%C3%BC", ("/äpi/x", b"/%C3%BC")),
        # A slash that ends the prefix and was not one on the wire: taken for one, as routing took it.
        ("/api/x/a", "/api/x", b"/api/x%2Fa", ("/api/x", b"/a")),
        # Not UTF-8: the server has put something else into `path`.
        ("/api/x/\ufffd", "/api/x", b"/api/x/%FF", ("/api/x", b"/%FF")),
        # No raw path, or one without the server's own root_path: encoded anew.
        ("/api/x/a b/ü%", "/api/x", None, ("/api/x", b"/a%20b/%C3%BC%25")),
        ("/outer/api/x/a b", "/outer/api/x", b"/api/x/a%20b", ("/outer/api/x", b"/a%20b")),
        ("/api/x/a", "/api/x", b"/api/x%", ("/api/x", b"/a")),
    ],
)
def test_path_is_split_behind_the_prefix_and_stays_encoded(
    path: str, root_path: str, raw_path: bytes | None, expected: tuple[str, bytes]
) -> None:
    assert _split(scope(path, root_path, raw_path)) == expected


def test_long_path_is_split_in_linear_time() -> None:
    rest = "/" * 1_000_000
    assert _split(scope(f"/api/x{rest}", "/api/x", f"/api/x{rest}".encode())) == ("/api/x", rest.encode())


async def test_close_before_the_first_request_is_nothing() -> None:
    proxy = Proxy(ProxyConfig(prefix="/x", target="http://127.0.0.1:1"))
    await proxy.close()
    await proxy.close()
