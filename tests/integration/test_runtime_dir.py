"""`relay.runtime_dir`: how ``relay publish`` finds a relay on this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from relay import runtime_dir


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep apart from relays that run here."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def directory(base: Path) -> Path:
    return base / f"relay-{os.getuid()}"


@pytest.fixture
def dead_pid() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def write(directory: Path, pid: int, redis_url: str, age_s: float = 0.0) -> Path:
    directory.mkdir(exist_ok=True)
    path = directory / f"{pid}.json"
    path.write_text(json.dumps({"page": "http://127.0.0.1:1/", "redis": redis_url}))
    when = path.stat().st_mtime - age_s
    os.utime(path, (when, when))
    return path


def test_relay_is_found_while_it_runs_and_not_after(directory: Path) -> None:
    assert runtime_dir.newest() is None
    with runtime_dir.announce("http://127.0.0.1:8000/", "redis://127.0.0.1:7000"):
        assert runtime_dir.newest() == "redis://127.0.0.1:7000"
        told = json.loads((directory / f"{os.getpid()}.json").read_text())
        assert told == {"page": "http://127.0.0.1:8000/", "redis": "redis://127.0.0.1:7000"}
    assert runtime_dir.newest() is None
    assert list(directory.iterdir()) == []


def test_relay_that_fails_is_not_found_afterwards(directory: Path) -> None:
    with pytest.raises(RuntimeError), runtime_dir.announce("http://127.0.0.1:8000/", "redis://127.0.0.1:7000"):
        raise RuntimeError
    assert list(directory.iterdir()) == []


def test_relay_without_a_redis_of_its_own_announces_nothing(base: Path) -> None:
    """Its address may hold a password."""
    with runtime_dir.announce("http://127.0.0.1:8000/", None):
        assert list(base.iterdir()) == []


def test_relay_whose_file_was_removed_ends_in_good_order(directory: Path) -> None:
    with runtime_dir.announce("http://127.0.0.1:8000/", "redis://127.0.0.1:7000"):
        (directory / f"{os.getpid()}.json").unlink()


def test_relay_started_last_wins(directory: Path) -> None:
    write(directory, os.getppid(), "redis://127.0.0.1:1", age_s=60)
    with runtime_dir.announce("http://127.0.0.1:8000/", "redis://127.0.0.1:2"):
        assert runtime_dir.newest() == "redis://127.0.0.1:2"
    assert runtime_dir.newest() == "redis://127.0.0.1:1"


def test_file_of_a_relay_that_was_killed_is_removed(directory: Path, dead_pid: int) -> None:
    path = write(directory, dead_pid, "redis://127.0.0.1:1")
    assert runtime_dir.newest() is None
    assert not path.exists()


def test_number_that_is_somebody_elses_process_by_now_is_no_relay(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Source: kill(2): EPERM for a process of another user."""
    path = write(directory, 12345, "redis://127.0.0.1:1")

    def kill(pid: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", kill)
    assert runtime_dir.newest() is None
    assert not path.exists()


def test_file_that_goes_while_it_is_read_is_no_relay(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(directory, os.getpid(), "redis://127.0.0.1:1")
    monkeypatch.setattr(os, "kill", lambda pid, number: path.unlink())
    assert runtime_dir.newest() is None


def test_file_that_is_being_written_is_not_read(directory: Path) -> None:
    directory.mkdir()
    (directory / f"{os.getpid()}.new").write_text('{"pa')
    assert runtime_dir.newest() is None


def test_directory_is_for_its_user_alone(directory: Path) -> None:
    runtime_dir.newest()
    assert directory.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("runtime", [None, "nowhere", "a file", "somebody else's"])
def test_directory_falls_back_to_the_machines_temporary_one(
    base: Path, monkeypatch: pytest.MonkeyPatch, runtime: str | None
) -> None:
    """One of somebody else is not trusted: anybody may have made it first, to send events to a Redis of their own."""
    (base / "tmp").mkdir()
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(base / "tmp"))
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    if runtime is not None:
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(base / runtime))
    if runtime == "a file":
        (base / runtime).touch()
    if runtime == "somebody else's":
        (base / runtime / f"relay-{os.getuid()}").mkdir(parents=True)
        lstat = Path.lstat
        theirs = (base / runtime / f"relay-{os.getuid()}").stat()

        def of_somebody(path: Path) -> os.stat_result:
            found = lstat(path)
            return (
                os.stat_result((*found[:4], found.st_uid + 1, *found[5:])) if found.st_ino == theirs.st_ino else found
            )

        monkeypatch.setattr(Path, "lstat", of_somebody)
    with runtime_dir.announce("http://127.0.0.1:8000/", "redis://127.0.0.1:7000"):
        assert runtime_dir.newest() == "redis://127.0.0.1:7000"
        assert (base / "tmp" / f"relay-{os.getuid()}" / f"{os.getpid()}.json").exists()


def test_without_any_directory_the_relay_serves_and_is_not_found(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(base / "nowhere"))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(base / "nowhere"))
    with runtime_dir.announce("http://127.0.0.1:8000/", "redis://127.0.0.1:7000"):
        assert runtime_dir.newest() is None


def test_full_disk_does_not_stop_the_relay(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(path: Path, text: str) -> int:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", write)
    with runtime_dir.announce("http://127.0.0.1:8000/", "redis://127.0.0.1:7000"):
        assert runtime_dir.newest() is None


def test_link_in_place_of_the_directory_is_judged_by_its_own_owner(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link of somebody else's to a directory of ours would have our files removed."""
    ours, asked = base / "ours", []
    ours.mkdir()
    (base / f"relay-{os.getuid()}").symlink_to(ours)
    lstat = Path.lstat

    def noting(path: Path) -> os.stat_result:
        asked.append(path)
        return lstat(path)

    monkeypatch.setattr(Path, "lstat", noting)
    runtime_dir.newest()
    assert base / f"relay-{os.getuid()}" in asked


@pytest.mark.parametrize("url", ["redis+sentinel://a:1,b:2/m", "redis+cluster://a:1,b:2", "redis://127.0.0.1:7"])
def test_address_that_is_not_announced_is_left_as_it_is(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime_dir, "_running", lambda: iter([(0.0, "", "redis://:pw@127.0.0.1:1")]))
    assert runtime_dir.with_password(url) == url
    assert runtime_dir.with_password("redis://127.0.0.1:1") == "redis://:pw@127.0.0.1:1"
