"""Build what is released, in dist/, and check it: ``make dist``.

The wheel and the source distribution of the relay and of its Python client, and the npm package of the browser client.
What is checked: metadata and content, that the source distribution makes the same wheel, and an installation into an
environment of its own, first of the core alone, then of the extra ``standard``. Only that needs the network, for the
dependencies; ``--offline`` leaves it out. All files get the time of the last commit, so that one commit makes the same
bytes each time.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
from collections.abc import Sequence
from contextlib import suppress
from email import message_from_bytes
from http.client import HTTPConnection
from pathlib import Path
from zipfile import ZipFile

from packaging.metadata import Metadata

ROOT = Path(__file__).parents[1]

CORE_ALONE = """
import asyncio, importlib.util, relay
gone = [name for name in ("typer", "uvicorn", "fastapi", "jwt", "psutil") if importlib.util.find_spec(name)]
assert not gone, f"the core alone installs {gone}"
app = relay.Relay("memory://", rest={"path": ""}, system_topic=False)
async def main():
    async with app.lifespan():
        await app.publish("room:1", "new_msg", {"text": "hi"})
asyncio.run(main())
"""


class Fault(Exception):
    """What is wrong with something that was built."""


def run(*command: str | Path, cwd: Path = ROOT, env: dict[str, str] | None = None) -> str:
    """Run a command to its end; returns what it prints. Raises Fault."""
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Fault(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def commit_time() -> str:
    """Seconds since 1970 of the last commit; of now outside of a repository."""
    with suppress(Fault, OSError):
        return run("git", "log", "-1", "--format=%ct").strip()
    return str(int(time.time()))


def build_environ() -> dict[str, str]:
    """The environment of a build: the wheel has nothing in C, so that it is the same on every machine and for all."""
    return {**os.environ, "SOURCE_DATE_EPOCH": commit_time(), "BUILD_SPEEDUPS": "no"}


def build(out: Path) -> list[Path]:
    """Build everything; returns the files."""
    env = build_environ()
    out.mkdir(parents=True, exist_ok=True)
    before = set(out.iterdir())
    for project in (ROOT, ROOT / "clients" / "python"):
        run(sys.executable, "-m", "hatchling", "build", "-d", out, cwd=project, env=env)
    if shutil.which("npm"):
        run("npm", "pack", "--ignore-scripts", "--pack-destination", out, cwd=ROOT / "clients" / "browser", env=env)
    else:
        print("npm is not installed: the package of the browser client is left out")  # noqa: T201 - a command
    return sorted(set(out.iterdir()) - before)


def one(files: Sequence[Path], start: str, end: str) -> Path:
    """The one file of this name. Raises Fault."""
    found = [path for path in files if path.name.startswith(start) and path.name.endswith(end)]
    if len(found) != 1:
        raise Fault(f"expected one {start}*{end}, got {[path.name for path in found]}")
    return found[0]


def names_in(path: Path) -> set[str]:
    """Names of the files in a wheel, a source distribution or an npm package, without the one directory around them."""
    if path.suffix == ".whl":
        with ZipFile(path) as archive:
            return set(archive.namelist())
    with tarfile.open(path) as archive:
        return {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}


def check_metadata(path: Path) -> None:
    """See that the metadata of a wheel or a source distribution is valid, and shows the README. Raises Fault."""
    if path.suffix == ".whl":
        with ZipFile(path) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
            raw = archive.read(name)
    else:
        with tarfile.open(path) as archive:
            member = archive.extractfile(f"{path.name.removesuffix('.tar.gz')}/PKG-INFO")
            assert member is not None, "a regular file"
            raw = member.read()
    try:
        metadata = Metadata.from_email(raw, validate=True)
    except ExceptionGroup as error:
        raise Fault(f"{path.name}: metadata: {'; '.join(map(str, error.exceptions))}") from None
    kind = message_from_bytes(raw)["Description-Content-Type"]
    if not metadata.description or kind != "text/markdown":
        raise Fault(f"{path.name}: expected a description in text/markdown, got {kind}")
    if metadata.license_expression != "MIT" or metadata.license_files != ["LICENSE"]:
        raise Fault(f"{path.name}: expected the license MIT with its file, got {metadata.license_expression}")


def check_content(files: Sequence[Path]) -> None:
    """See that all is in there, and nothing else. Raises Fault."""
    wheel, sdist = (one(files, "starlette_relay-", end) for end in (".whl", ".tar.gz"))
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "relay").rglob("*") if path.is_file()}
    sources = {name for name in sources if "__pycache__" not in name and not name.endswith(".so")}
    package = json.loads((ROOT / "clients" / "browser" / "package.json").read_text())
    modules = [name for name in package["files"] if name.endswith(".js")]
    own = {name for name in names_in(wheel) if ".dist-info/" not in name}
    expected = sources | {f"relay/web/static/{name}" for name in modules}
    if own != expected:
        raise Fault(f"{wheel.name}: differs from the sources: {sorted(own ^ expected)}")
    needed = {"pyproject.toml", "hatch_build.py", "README.md", "LICENSE", *sources}
    needed |= {f"clients/browser/{name}" for name in modules}
    if missing := needed - names_in(sdist):
        raise Fault(f"{sdist.name}: lacks {sorted(missing)}")
    client = one(files, "starlette_relay_client-", ".whl")
    if "relay_client/py.typed" not in names_in(client):
        raise Fault(f"{client.name}: lacks relay_client/py.typed")
    packed = [path for path in files if path.suffix == ".tgz"]
    for path in packed:
        expected = {"package.json", "README.md", "LICENSE", *package["files"]}
        if (found := names_in(path)) != expected:
            raise Fault(f"{path.name}: expected {sorted(expected)}, got {sorted(found)}")
        version = package["version"]
        if f"-{version}.tgz" not in path.name or f"-{version}-" not in wheel.name:
            raise Fault(f"{path.name} and {wheel.name}: expected one version")


def check_sdist(files: Sequence[Path], work: Path) -> None:
    """See that the source distribution makes the same wheel. Raises Fault."""
    sdist, wheel = (one(files, "starlette_relay-", end) for end in (".tar.gz", ".whl"))
    with tarfile.open(sdist) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # which Python has since 3.11.4
        archive.extractall(work)
    env = build_environ()
    source = work / sdist.name.removesuffix(".tar.gz")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", work / "again", cwd=source, env=env)
    if (work / "again" / wheel.name).read_bytes() != wheel.read_bytes():
        raise Fault(f"{sdist.name}: makes another wheel than the repository")


def check_installation(files: Sequence[Path], work: Path) -> None:
    """Install into an environment of its own, and use what was installed. Raises Fault."""
    wheel = one(files, "starlette_relay-", ".whl")
    venv.create(work / "venv", with_pip=True)
    python = work / "venv" / "bin" / "python"
    env = {name: value for name, value in os.environ.items() if not name.startswith(("RELAY_", "PYTHON"))}
    run(python, "-m", "pip", "install", "--quiet", wheel, cwd=work, env=env)
    run(python, "-c", CORE_ALONE, cwd=work, env=env)
    run(python, "-m", "pip", "install", "--quiet", f"{wheel}[standard]", one(files, "starlette_relay_client-", ".whl"))
    run(python, "-m", "pip", "check", cwd=work, env=env)
    run(python, "-c", "import relay_client", cwd=work, env=env)
    check_service(work / "venv" / "bin" / "relay", work, env)


def check_service(relay: Path, work: Path, env: dict[str, str]) -> None:
    """Start the service, ask it for the browser client, and stop it. Raises Fault."""
    run(relay, "check", cwd=work, env=env)
    command = [str(relay), "serve", "--port", "0"]
    with subprocess.Popen(command, cwd=work, env=env, stdout=subprocess.PIPE, text=True) as service:
        try:
            assert service.stdout is not None
            lines = iter(service.stdout.readline, "")
            address = next((line.split("://")[1].strip().rstrip("/") for line in lines if "page " in line), None)
            if address is None:
                raise Fault("relay serve ended without an address")
            connection = HTTPConnection(address, timeout=10)
            for path in ("/health", "/ready", "/static/relay.js", "/console", "/api/topics", "/metrics"):
                connection.request("GET", path)
                answer = connection.getresponse()
                if not answer.read() or answer.status != 200:
                    raise Fault(f"{path}: expected 200, got {answer.status}")
        finally:
            service.terminate()
    if service.returncode != 0:
        raise Fault(f"relay serve ended with {service.returncode}")


def main() -> int:
    """Build and check; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="where to build; emptied before")
    parser.add_argument("--offline", action="store_true", help="do not install: that downloads the dependencies")
    options = parser.parse_args()
    if options.out.exists():
        shutil.rmtree(options.out)
    try:
        files = build(options.out.resolve())
        for path in files:
            if path.suffix != ".tgz":
                check_metadata(path)
        check_content(files)
        with tempfile.TemporaryDirectory(prefix="relay-dist-") as work:
            check_sdist(files, Path(work))
            if not options.offline:
                check_installation(files, Path(work))
    except Fault as fault:
        print(f"dist: {fault}", file=sys.stderr)  # noqa: T201 - a command
        return 1
    for path in files:
        print(f"{path.stat().st_size:>9}  {path.relative_to(options.out.resolve().parent)}")  # noqa: T201 - a command
    return 0


if __name__ == "__main__":
    sys.exit(main())
