"""Which relays with an embedded server run on this machine: one small file each, for ``relay publish`` and ``bench``.

Owns those files, in a directory that only their user can read; must not know what a relay is.
"""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def _directory() -> Path | None:
    """Where the files are: in the user's runtime directory, or that for temporary files; None without either."""
    for base in filter(None, (os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir())):
        path = Path(base) / f"relay-{os.getuid()}"
        with suppress(OSError):
            path.mkdir(mode=0o700, exist_ok=True)
            # In /tmp anybody may have made it first.
            if path.lstat().st_uid == os.getuid() and os.access(path, os.W_OK):
                return path
    return None


@contextmanager
def announce(page_url: str, redis_url: str | None) -> Iterator[None]:
    """For the duration of the block, let others on this machine find a relay; without a Redis URL, do nothing."""
    directory = _directory() if redis_url is not None else None
    if directory is None:
        yield
        return
    path = directory / f"{os.getpid()}.json"
    unfinished = path.with_suffix(".new")
    with suppress(OSError):  # a full disk, say: the relay is not found then, and serves all the same
        unfinished.write_text(json.dumps({"page": page_url, "redis": redis_url}))
        unfinished.replace(path)  # at once, so that nobody reads half of it
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def newest() -> str | None:
    """The Redis URL of the relay started last; None where none runs."""
    found = [(started, redis_url) for started, _, redis_url in _running()]
    return max(found)[1] if found else None


def redis_of(page_url: str) -> str | None:
    """The Redis URL of the relay with this page, as it was announced; None where it did not announce one."""
    return next((redis_url for _, page, redis_url in _running() if page == page_url), None)


def _running() -> Iterator[tuple[float, str, str]]:
    """Start, page and Redis URL of each relay that runs. Files of relays that were killed are removed."""
    directory = _directory()
    for path in directory.glob("*.json") if directory is not None else ():
        try:
            os.kill(int(path.stem), 0)
            announced = json.loads(path.read_text())
            yield path.stat().st_mtime, announced["page"], announced["redis"]
        except (ProcessLookupError, PermissionError, FileNotFoundError):  # its number may be somebody else's by now
            path.unlink(missing_ok=True)
