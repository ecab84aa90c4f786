"""`relay.paths`: paths by segments, and as the client has encoded them."""

from typing import Any

import pytest

from relay.paths import below, replace_route_path, route_path, segments, split_raw


def scope(path: str, root: str = "", raw: bytes | None = None) -> dict[str, Any]:
    return {"path": path, "root_path": root, "raw_path": raw}


@pytest.mark.parametrize(
    ("path", "root", "rest"),
    [
        ("/a/b", "", "/a/b"),
        ("/relay/a", "/relay", "/a"),
        ("/relay", "/relay", ""),
        ("/relayed/a", "/relay", "/relayed/a"),
        ("/a", "/relay", "/a"),
        ("/relay//a", "/relay", "//a"),
    ],
)
def test_path_below_a_mount(path: str, root: str, rest: str) -> None:
    assert route_path(scope(path, root)) == rest


@pytest.mark.parametrize(
    ("path", "expected"),
    [("", ()), ("/", ()), ("//", ()), ("/a", ("a",)), ("//a///b/", ("a", "b")), ("/a b/%2F", ("a b", "%2F"))],
)
def test_segments_are_what_stands_between_slashes(path: str, expected: tuple[str, ...]) -> None:
    assert segments(path) == expected


@pytest.mark.parametrize(
    ("path", "count", "expected"),
    [
        ("/api/x", 1, "/x"),
        ("//api///x//y/", 1, "/x//y/"),
        ("/api", 1, ""),
        ("/api/", 1, "/"),
        ("/a/b/c", 2, "/c"),
        ("/a", 2, None),
        ("", 1, None),
    ],
)
def test_rest_of_a_path_keeps_its_slashes_but_the_first(path: str, count: int, expected: str | None) -> None:
    assert below(path, count) == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (scope("/a/b", "", b"/a%2Fb"), ("", b"/a%2Fb", True)),
        (scope("/re lay/a/b", "/re lay", b"/re%20lay/a%2Fb"), ("/re lay", b"/a%2Fb", True)),
        (scope("/relay/a b", "/relay", None), ("/relay", b"/a%20b", False)),
        (scope("/relay/a", "/relay", b"/other/a"), ("/relay", b"/a", False)),
        (scope("/relay/changed", "/relay", b"/relay/as-it-came"), ("/relay", b"/changed", False)),
        (scope("/relay", "/relay", b"/relay"), ("/relay", b"", True)),
    ],
)
def test_raw_path_is_split_at_the_mount(given: dict[str, Any], expected: tuple[str, bytes, bool]) -> None:
    """A raw path that a middleware has left behind is not the request's."""
    assert split_raw(given) == expected


def test_replaced_path_is_consistent() -> None:
    replaced = replace_route_path(scope("/re lay//a", "/re lay", b"/re%20lay//a"), "/a/b", b"/a%2Fb")
    assert (replaced["path"], replaced["raw_path"]) == ("/re lay/a/b", b"/re%20lay/a%2Fb")
    assert split_raw(replaced) == ("/re lay", b"/a%2Fb", True)
