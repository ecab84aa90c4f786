"""Put the browser client, which has its own folder and tests, into the wheel that serves it, and build what is in C.

The part in C is optional: where it cannot be built, one line says so, and relay does the same without it. The variable
``BUILD_SPEEDUPS`` says ``yes`` to make a failure an error, or ``no`` to leave it out, as in the wheel that is released.
"""

import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_SOURCE = "relay/transports/speedups.c"
_EXTENSION = "relay/transports/speedups.abi3.so"


class RelayBuildHook(BuildHookInterface):
    """Adds both, but no browser client to an editable install, where a second ``relay/`` would hide the real one."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before each build; ``version`` is ``standard`` or ``editable``."""
        in_place = Path(self.root, _EXTENSION)
        self._work = tempfile.TemporaryDirectory(prefix="relay-build-")
        # Beside it, where it can be renamed; two environments may be made at once.
        beside = in_place.with_suffix(f".{os.getpid()}.so")
        made = Path(self._work.name, in_place.name) if version == "standard" else beside
        if version == "standard":
            for name in ("relay.js", "presence.js"):
                build_data["force_include"][f"clients/browser/{name}"] = f"relay/web/static/{name}"
        wanted = os.environ.get("BUILD_SPEEDUPS", "")
        fault = "" if wanted == "no" else _compile(Path(self.root, _SOURCE), made)
        if fault and wanted == "yes":
            raise RuntimeError(f"{_SOURCE} cannot be built: {fault}")
        if fault:
            self.app.display_warning(f"{_SOURCE} cannot be built, and is left out: {fault}")
        if not made.exists():
            if version != "standard":
                in_place.unlink(missing_ok=True)  # of an earlier state of the source
        elif version == "standard":
            build_data["force_include"][str(made)] = _EXTENSION
            build_data["pure_python"] = False
            platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["tag"] = f"cp311-abi3-{platform}"
        else:
            made.replace(in_place)  # a process that has loaded the former one keeps it

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Called by hatchling after each build."""
        self._work.cleanup()


def _compile(source: Path, made: Path) -> str:
    """Compile, for this Python and all later ones; returns in one line what went wrong, empty if nothing did."""
    if os.name != "posix" or sys.implementation.name != "cpython" or sysconfig.get_config_var("Py_GIL_DISABLED"):
        return "it is for CPython with its GIL, on POSIX systems"
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
    shared = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared", "-fPIC"]
    headers = sorted({sysconfig.get_path(name) for name in ("include", "platinclude")})
    flags = [*shlex.split(os.environ.get("CFLAGS", "-O2")), *shared, *(f"-I{each}" for each in headers)]
    command = [*compiler, *flags, source.name, "-o", str(made)]
    try:
        done = subprocess.run(command, cwd=source.parent, capture_output=True, text=True, check=False, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode == 0:
        return ""
    lines = [line for line in done.stderr.splitlines() if "error" in line] or [f"exit code {done.returncode}"]
    return lines[0].strip()
