"""Which relays with an embedded server run on this machine: one small file each, for ``relay publish`` and ``bench``.

Owns those files, in a directory that only their user can read; must not know what a relay is.
"""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit


def directory() -> Path | None:
    """Where the files are: in the user's runtime directory, or that for temporary files; None without either."""
    bases = [os.environ.get("XDG_RUNTIME_DIR")]
    with suppress(OSError):  # no directory for temporary files can be written
        bases.append(tempfile.gettempdir())
    for base in filter(None, bases):
        path = Path(base) / f"relay-{os.getuid()}"
        with suppress(OSError):
            path.mkdir(mode=0o700, exist_ok=True)
            # In /tmp anybody may have made it first.
            if path.lstat().st_uid == os.getuid() and os.access(path, os.W_OK):
                return path
    return None


@contextmanager
def announce(page_url: str, redis_url: str | None) -> Iterator[None]:
    """For the duration of the block, let this user's programs find a relay; without a Redis URL, do nothing.

    Args: page_url: empty for a relay in another app, which does not know its own address.
          redis_url: its password is for this user alone, so the file is too.
    """
    place = directory() if redis_url is not None else None
    if place is None or redis_url is None:
        yield
        return
    # One process may hold several relays, each with a server of its own.
    number = "" if page_url else f"-{urlsplit(redis_url).port}"
    path = place / f"{os.getpid()}{number}.json"
    unfinished = path.with_suffix(".new")
    with suppress(OSError):  # a full disk, say: the relay is not found then, and serves all the same
        unfinished.touch(mode=0o600)
        unfinished.write_text(json.dumps({"page": page_url, "redis": redis_url}))
        unfinished.replace(path)  # atomic, so that no reader gets half of it
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


def with_password(redis_url: str) -> str:
    """The URL, with user and password where it is that of a relay announced here and has none of its own."""
    given = urlsplit(redis_url)
    if given.scheme == "redis" and given.username is None:  # of Sentinels and clusters none is announced
        for _, _, announced in _running():
            found = urlsplit(announced)
            if (found.scheme, found.hostname, found.port) == (given.scheme, given.hostname, given.port):
                return announced
    return redis_url


def _running() -> Iterator[tuple[float, str, str]]:
    """Start, page and Redis URL of each relay that runs. Files of relays that were killed are removed."""
    place = directory()
    for path in place.glob("*.json") if place is not None else ():
        try:
            os.kill(int(path.stem.partition("-")[0]), 0)
            announced = json.loads(path.read_text())
            yield path.stat().st_mtime, announced["page"], announced["redis"]
        except (ProcessLookupError, PermissionError, FileNotFoundError):  # another user's process may have its number
            path.unlink(missing_ok=True)
