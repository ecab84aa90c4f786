"""`relay.siblings`: processes of one app are found where each has a bus of its own, and no others are."""

import json
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from relay.siblings import Siblings

SETTING = 'broadcast_url = "memory://"'


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep apart from relays that run here."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / f"relay-{os.getuid()}"


@pytest.fixture
def bound() -> Iterator[socket.socket]:
    """A socket that is bound and does not listen yet, as a server's is before its workers start."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        yield listener


def another(base: Path, **changes: object) -> Path:
    """Leave what another process would have left, were it started from the same parent with the same socket."""
    Siblings(SETTING).check()
    (own,) = base.glob("*.bus")
    path = base / f"{os.getppid()}.bus"
    path.write_text(json.dumps({**json.loads(own.read_text()), **changes}))
    own.unlink()
    return path


def test_process_with_the_same_parent_and_address_is_found(
    base: Path, bound: socket.socket, caplog: pytest.LogCaptureFixture
) -> None:
    another(base)
    siblings = Siblings(SETTING)
    siblings.check()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith(
        f"several processes serve this app (this one and {os.getppid()}), and {SETTING}"
    )
    siblings.leave()
    assert not (base / f"{os.getpid()}.bus").exists()


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"parent": 1}, id="another parent"),
        pytest.param({"listens": ["('127.0.0.1', 1)"]}, id="another address"),
        pytest.param({"listens": []}, id="no address"),
        pytest.param({"spaces": ["pid:[1]", "net:[2]"]}, id="another container"),
    ],
)
def test_process_of_another_app_is_not_found(
    base: Path, bound: socket.socket, caplog: pytest.LogCaptureFixture, changes: dict[str, object]
) -> None:
    another(base, **changes)
    Siblings(SETTING).check()
    assert caplog.records == []


def test_processes_with_a_common_bus_leave_nothing(base: Path, bound: socket.socket) -> None:
    siblings = Siblings("")
    siblings.check()
    siblings.check_once()
    siblings.leave()
    assert not base.exists()


def test_connected_sockets_are_no_addresses(base: Path, bound: socket.socket) -> None:
    """Two processes may be connected to the same server."""
    bound.listen()
    with socket.create_connection(bound.getsockname()) as connection, bound.accept()[0]:
        Siblings(SETTING).check()
        (own,) = base.glob("*.bus")
        listens = json.loads(own.read_text())["listens"]
        assert str(bound.getsockname()) in listens
        assert str(connection.getsockname()) not in listens
        assert connection.send(b"x") == 1, "looking at a socket leaves it open"


def test_address_that_is_bound_after_the_start_is_checked_with_the_first_socket(
    base: Path, bound: socket.socket, caplog: pytest.LogCaptureFixture
) -> None:
    path = another(base)
    facts = path.read_text()
    path.unlink()
    siblings = Siblings(SETTING)
    siblings.check()
    path.write_text(facts)
    siblings.check_once()
    siblings.check_once()
    assert len(caplog.records) == 1


def test_file_of_a_process_that_was_killed_is_removed(base: Path, bound: socket.socket) -> None:
    path = another(base)
    path = path.rename(base / "4194303.bus")  # above the highest number of a process
    Siblings(SETTING).check()
    assert not path.exists()


def test_without_a_directory_nothing_is_checked(monkeypatch: pytest.MonkeyPatch, base: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/proc/nowhere")
    monkeypatch.setattr("tempfile.gettempdir", lambda: "/proc/nowhere")
    siblings = Siblings(SETTING)
    siblings.check()
    siblings.leave()
