"""Other processes of the same app, where each has a bus of its own, so that events reach a part of the sockets only.

Owns how they find each other: by a file each, in the directory of `relay.runtime_dir`. Two are of one app where one
parent has started them and they listen on the same address: workers of a server do (Uvicorn, Hypercorn, Granian,
gunicorn), and two unrelated relays cannot.
"""

import json
import logging
import os
import socket as sockets
from contextlib import suppress
from pathlib import Path
from typing import Any

from relay import runtime_dir

_logger = logging.getLogger("relay")

_ENDING = ".bus"


class Siblings:
    """The processes beside this one.

    Args: setting: the one that makes a bus for each process; empty for a bus that they have in common, of which there
              is nothing to find.
    """

    def __init__(self, setting: str) -> None:
        self._setting = setting
        self._path: Path | None = None
        # The server may bind its address only after the relay has started.
        self._is_checked_late = not setting

    def check(self) -> None:
        """Let the others find this process, and warn where there are others."""
        directory = runtime_dir.directory() if self._setting else None
        if directory is None:
            return
        own = _own()
        self._path = directory / f"{os.getpid()}{_ENDING}"
        with suppress(OSError):  # not found then, and no worse off
            unfinished = self._path.with_suffix(".new-bus")
            unfinished.write_text(json.dumps(own))
            unfinished.replace(self._path)
        if pids := [str(pid) for pid, other in _others(directory) if _is_of_one_app(own, other)]:
            _logger.warning(
                "several processes serve this app (this one and %s), and %s is a bus of each alone: events reach only "
                'a part of the sockets; set redis_url = "redis://…", or serve with one worker',
                ", ".join(pids),
                self._setting,
            )

    def check_once(self) -> None:
        """Check again when the first socket has come."""
        if not self._is_checked_late:
            self._is_checked_late = True
            self.check()

    def leave(self) -> None:
        """Be found no more."""
        if self._path is not None:
            with suppress(OSError):
                self._path.unlink(missing_ok=True)


def _own() -> dict[str, Any]:
    # Containers may have a directory in common, but neither processes nor addresses.
    spaces = []
    for name in ("pid", "net"):
        with suppress(OSError):
            spaces.append(str(Path(f"/proc/self/ns/{name}").readlink()))
    return {"parent": os.getppid(), "spaces": spaces, "listens": sorted(_addresses())}


def _addresses() -> set[str]:
    """Addresses that sockets of this process are bound to and not connected, whether they listen already or not yet."""
    found: set[str] = set()
    try:
        numbers = [int(name) for name in os.listdir("/dev/fd")]
    except OSError:
        return found
    for number in numbers:
        with suppress(OSError):  # no socket, or closed meanwhile
            socket = sockets.socket(fileno=number)
            try:
                if socket.type == sockets.SOCK_STREAM and (address := _bound(socket)):
                    found.add(address)
            finally:
                _ = socket.detach()
    return found


def _bound(socket: sockets.socket) -> str:
    address = socket.getsockname()
    if socket.family in (sockets.AF_INET, sockets.AF_INET6):
        is_bound = address[1] != 0
    else:
        is_bound = socket.family == sockets.AF_UNIX and bool(address)
    try:
        _ = socket.getpeername()
    except OSError:
        return str(address) if is_bound else ""
    return ""


def _others(directory: Path) -> list[tuple[int, dict[str, Any]]]:
    """Number and facts of each other process that runs. Files of processes that were killed are removed."""
    found = []
    for path in directory.glob(f"*{_ENDING}"):
        if path.stem == str(os.getpid()):
            continue
        try:
            pid = int(path.stem)
            os.kill(pid, 0)
            found.append((pid, json.loads(path.read_text())))
        except (ProcessLookupError, PermissionError, FileNotFoundError):  # its number may be another user's by now
            path.unlink(missing_ok=True)
    return found


def _is_of_one_app(own: dict[str, Any], other: dict[str, Any]) -> bool:
    same = own["parent"] == other["parent"] and own["spaces"] == other["spaces"]
    return same and bool({*own["listens"]} & {*other["listens"]})
