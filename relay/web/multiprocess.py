"""A directory where workers leave what the others may want to know, one file each.

Owns the files and their locks; must not know what is in them.

A worker keeps its file locked while it lives; the system lets go of the lock at its end, whatever that is. What the
ended have left is put together in one file, so that restarts do not fill the directory.
"""

import fcntl
import json
import os
import uuid
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_ENDED = "ended.json"
_LOCK = "lock"


class SnapshotStore:
    """The directory, as one worker sees it.

    Args: path: where it is; made where it is not.
          merge_exited: makes one of what several workers have left that have ended.
    """

    def __init__(self, path: Path, merge_exited: Callable[[list[Any]], Any]) -> None:
        self._path = path
        self._merge_exited = merge_exited
        # This worker's file, whose descriptor holds the lock; opened by the first write.
        self._own: int | None = None

    def write(self, value: Any) -> None:
        """Replace what this worker has left by ``value``, which is anything that JSON can say."""
        self._path.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._locked(fcntl.LOCK_EX):
            if self._own is None:
                self._merge_files()
                self._own = os.open(self._path / f"{uuid.uuid4().hex}.json", os.O_WRONLY | os.O_CREAT, 0o600)
                fcntl.flock(self._own, fcntl.LOCK_EX)
                # With this object the worker ends, so that one process may be several workers, one after the other.
                weakref.finalize(self, os.close, self._own)
            # In one call: a worker that is killed meanwhile leaves the whole of it or nothing.
            _ = os.pwrite(self._own, json.dumps(value).encode(), 0)

    def read(self) -> list[Any]:
        """What each worker that lives has left, and last what is left of the others."""
        with self._locked(fcntl.LOCK_SH):
            living, ended = self._sorted()
            return [*map(_read, living), self._merge_exited([_read(path) for path in ended])]

    def _merge_files(self) -> None:
        _, ended = self._sorted()
        text = json.dumps(self._merge_exited([_read(path) for path in ended]))
        unfinished = self._path / "unfinished"
        unfinished.write_text(text, "utf-8")
        unfinished.replace(self._path / _ENDED)
        for path in ended:
            if path.name != _ENDED:
                path.unlink()

    @contextmanager
    def _locked(self, how: int) -> Iterator[None]:
        with (self._path / _LOCK).open("ab") as lock:
            fcntl.flock(lock, how)
            yield

    def _sorted(self) -> tuple[list[Path], list[Path]]:
        living: list[Path] = []
        ended: list[Path] = []
        for path in sorted(self._path.glob("*.json")):
            (living if _is_locked(path) else ended).append(path)
        return living, ended


def _is_locked(path: Path) -> bool:
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def _read(path: Path) -> Any:
    # A shorter text is written over a longer one: behind its end stands what was left of that.
    value, _ = json.JSONDecoder().raw_decode(path.read_text("utf-8"))
    return value
