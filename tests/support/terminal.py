"""A command on a terminal of its own, as somebody at the keyboard has it."""

import os
import pty
import subprocess
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path


def run_on_terminal(
    command: Sequence[str], *, cwd: Path, env: Mapping[str, str], timeout_s: float = 120.0
) -> tuple[int, str]:
    """Run a command to its end; returns its exit code, and all that it printed there, standard error too."""
    ours, theirs = pty.openpty()
    pieces: list[bytes] = []

    def read() -> None:
        with suppress(OSError):  # how a terminal ends
            while piece := os.read(ours, 65536):
                pieces.append(piece)

    process = subprocess.Popen(command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs)
    os.close(theirs)
    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        code = process.wait(timeout_s)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        reader.join(timeout_s)
        os.close(ours)
    return code, b"".join(pieces).decode().replace("\r\n", "\n")
