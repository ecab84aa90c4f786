"""What ``make dist`` builds: packages that are complete and can be used without the repository around them."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
from redis import Redis
from ruamel.yaml import YAML

from relay.transports import plain_sockets
from tests.integration.test_examples import node_process
from tests.support.node import SCRIPTS, compile_typescript, need_browser, need_node, run_checks
from tests.support.patience import PATIENCE
from tests.support.process import RelayProcess, Valkey, free_port, wait_for

ROOT = Path(__file__).parents[2]
README = ROOT / "clients" / "browser" / "README.md"


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages, built and checked without the network."""
    out = tmp_path_factory.mktemp("dist") / "dist"
    command = [sys.executable, str(ROOT / "tools" / "dist.py"), "--offline", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180 * PATIENCE, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "starlette_relay-" in done.stdout
    return out


def the(dist: Path, pattern: str) -> Path:
    (found,) = dist.glob(pattern)
    return found


def test_packages_hold_no_path_of_the_machine_that_built_them(dist: Path) -> None:
    needle = str(ROOT).encode()

    def has_path(name: str, content: bytes) -> bool:
        """Whether a file names this directory, more often than its source, which may name one that is called so."""
        source = ROOT / name
        return content.count(needle) > (source.read_bytes().count(needle) if source.is_file() else 0)

    with ZipFile(the(dist, "starlette_relay-*.whl")) as wheel:
        assert [name for name in wheel.namelist() if has_path(name, wheel.read(name))] == []
    for path in (*dist.glob("*.tar.gz"), *dist.glob("*.tgz")):
        with tarfile.open(path) as archive:
            for member in archive.getmembers():
                content = archive.extractfile(member)
                _, _, name = member.name.partition("/")
                assert content is None or not has_path(name, content.read()), member.name


def test_wheel_serves_without_the_repository(dist: Path, tmp_path: Path) -> None:
    """With the packages of this environment, which a test without the network cannot download."""
    target = tmp_path / "site"
    wheel = the(dist, "starlette_relay-*.whl")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(target),
        str(wheel),
    ]
    done = subprocess.run(pip, capture_output=True, text=True, check=False, timeout=120 * PATIENCE)
    assert done.returncode == 0, done.stderr
    code = (
        "import relay, sys; from pathlib import Path\n"
        "from starlette.testclient import TestClient\n"
        "assert Path(relay.__file__).is_relative_to(sys.argv[1]), relay.__file__\n"
        "with TestClient(relay.Relay('memory://'), base_url='http://127.0.0.1') as client:\n"
        "    for path in ('/health', '/ready', '/', '/console', '/static/relay.js', '/static/console.js'):\n"
        "        assert client.get(path).status_code == 200, path\n"
    )
    environ = {**os.environ, "PYTHONPATH": str(target)}
    done = subprocess.run(
        [sys.executable, "-c", code, target], cwd=tmp_path, env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_fault_in_what_is_built_is_exit_code_1_with_one_line(dist: Path, tmp_path: Path) -> None:
    """The check of the content, against a wheel that lacks the browser client."""
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import dist as tool  # type: ignore[import-not-found]  # a script, in no package
    finally:
        sys.path.pop(0)
    copy = tmp_path / "dist"
    shutil.copytree(dist, copy)
    wheel = the(copy, "starlette_relay-*.whl")
    with ZipFile(wheel) as archive:
        kept = {name: archive.read(name) for name in archive.namelist() if not name.endswith("static/relay.js")}
    with ZipFile(wheel, "w") as archive:
        for name, content in kept.items():
            archive.writestr(name, content)
    with pytest.raises(tool.Fault, match=r"differs from the sources: \['relay/web/static/relay.js'\]"):
        tool.check_content(sorted(copy.iterdir()))
    with pytest.raises(tool.Fault, match="makes another wheel"):
        tool.check_sdist(sorted(copy.iterdir()), tmp_path)


# The part in C.


def build_wheel(out: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    environ = {**os.environ, "BUILD_SPEEDUPS": "", **environ}
    return subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False, timeout=180 * PATIENCE
    )


def test_released_wheel_has_no_part_in_c(dist: Path) -> None:
    assert the(dist, "starlette_relay-*.whl").name.endswith("-py3-none-any.whl")
    with ZipFile(the(dist, "starlette_relay-*.whl")) as archive:
        assert [name for name in archive.namelist() if name.endswith(".so")] == []


def test_build_without_a_compiler_says_so_in_one_line(tmp_path: Path) -> None:
    done = build_wheel(tmp_path, CC="no-such-compiler")
    assert done.returncode == 0
    said = [line for line in (done.stdout + done.stderr).splitlines() if "speedups" in line]
    assert len(said) == 1 and "is left out: [Errno 2]" in said[0] and "no-such-compiler" in said[0]
    assert the(tmp_path, "*.whl").name.endswith("-py3-none-any.whl")
    refused = build_wheel(tmp_path, CC="no-such-compiler", BUILD_SPEEDUPS="yes")
    assert refused.returncode != 0 and "speedups.c cannot be built" in refused.stderr


def test_build_with_a_compiler_has_the_part_in_c(tmp_path: Path) -> None:
    """In the wheel that an installation from source makes; it is loaded from there."""
    if plain_sockets.send_to_each is None:
        pytest.skip("relay/transports/speedups.c is not built here")
    done = build_wheel(tmp_path, BUILD_SPEEDUPS="yes")
    assert done.returncode == 0, done.stderr
    wheel = the(tmp_path, "*.whl")
    assert "-cp311-abi3-" in wheel.name
    with ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "import sys; from pathlib import Path; from relay.transports import plain_sockets, speedups\n"
        "assert Path(speedups.__file__).is_relative_to(sys.argv[1]), speedups.__file__\n"
        "assert plain_sockets.form(True) == 'c'\n"
    )
    environ = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-c", code, str(tmp_path / "site")]
    done = subprocess.run(
        command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False, timeout=60 * PATIENCE
    )
    assert done.returncode == 0, done.stderr


# React.


@pytest.fixture
def react_app(dist: Path, tmp_path: Path) -> Iterator[Path]:
    """An app of the README's two files, with the npm package that was built."""
    need_node()
    app = tmp_path / "app"
    packages = app / "node_modules"
    packages.mkdir(parents=True)
    for name in ("react", "react-dom", "vite", "@types"):
        (packages / name).symlink_to(SCRIPTS / "node_modules" / name)
    with tarfile.open(the(dist, "starlette-relay-client-*.tgz")) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # which Python has since 3.11.4
        archive.extractall(tmp_path / "packed")
    shutil.move(tmp_path / "packed" / "package", packages / "starlette-relay-client")
    hook, component = (
        re.findall(rf"```{kind}\n(.*?)```", README.read_text("utf-8"), re.DOTALL)[0] for kind in ("ts", "tsx")
    )
    assert len([line for line in hook.splitlines() if line and not line.startswith(("/**", "import", "type"))]) <= 20
    (app / "useChannel.ts").write_text(hook)
    (app / "Room.tsx").write_text(component)
    (app / "main.tsx").write_text("""
import { StrictMode, useState } from "react";
import { createRoot } from "react-dom/client";
import { Room } from "./Room";
function App() {
  const [topic, setTopic] = useState("room:1");
  return <>
    <button id="other" onClick={() => setTopic("room:2")}>other</button>
    <button id="refused" onClick={() => setTopic("secret:1")}>refused</button>
    <button id="none" onClick={() => setTopic("")}>none</button>
    {topic && <Room topic={topic} />}
  </>;
}
createRoot(document.getElementById("root")!).render(<StrictMode><App /></StrictMode>);
""")
    (app / "index.html").write_text(
        '<!doctype html><link rel="icon" href="data:,"><div id="root"></div>'
        '<script type="module" src="/main.tsx"></script>'
    )
    yield app


def test_react_hook_is_what_typescript_understands(react_app: Path) -> None:
    files = [react_app / name for name in ("useChannel.ts", "Room.tsx", "main.tsx")]
    compile_typescript(react_app, *files)


def test_react_hook_works_in_a_browser(react_app: Path, tmp_path: Path) -> None:
    need_browser()
    port, key = free_port(), "key-of-sixteen-characters"
    (tmp_path / "relay.toml").write_text(
        f'allow_anonymous = true\n[rest]\napi_key = "{key}"\n'
        '[[auth.anonymous]]\nmatch = "room:*"\nrights = ["join", "push"]\n'
    )
    with Valkey() as valkey, RelayProcess("-c", str(tmp_path / "relay.toml"), "--redis-url", valkey.url) as relay:
        (react_app / "vite.config.js").write_text(
            'export default { esbuild: { jsx: "automatic" }, server: { hmr: false, proxy: '
            f'{{ "/socket": {{ target: "{relay.http}", ws: true }} }} }} }};'
        )
        vite = ["node", "node_modules/vite/bin/vite.js", "--host", "127.0.0.1", "--port", str(port), "--strictPort"]
        with node_process(vite, react_app, f"http://127.0.0.1:{port}/"), Redis(port=valkey.port) as redis:
            pushes = redis.pubsub(ignore_subscribe_messages=True)
            pushes.psubscribe("from:*")
            run_checks("react-chromium.mjs", f"http://127.0.0.1:{port}", relay.http, key, redis_url=valkey.url)
            heard: list[Any] = []

            def hears() -> bool:
                heard.append(pushes.get_message(timeout=1))
                return heard[-1] is not None

            wait_for(hears, "the push")
            assert (heard[-1]["channel"], heard[-1]["data"]) == (b"from:room:1:shout", b'{"text":"hello"}')


# The workflows.


def test_release_workflow_follows_its_schema_and_uses_no_secret_but_its_own() -> None:
    path = ROOT / ".github" / "workflows" / "release.yml"
    checker = Path(sys.executable).parent / "check-jsonschema"
    done = subprocess.run(
        [checker, "--builtin-schema", "vendor.github-workflows", path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    assert set(re.findall(r"secrets\.(\w+)", path.read_text())) == {"GITHUB_TOKEN"}
    jobs = YAML(typ="safe").load(path.read_text())["jobs"]
    steps = [step.get("run", "") for step in jobs["build"]["steps"]]
    assert [step for step in steps if step.startswith("make ")] == [
        "make install",
        "make check",
        "make test",
        "make dist",
    ]
    assert all(job["needs"] == "build" for name, job in jobs.items() if name != "build")


def test_both_packages_have_one_version() -> None:
    package = json.loads((ROOT / "clients" / "browser" / "package.json").read_text())
    found = re.search(r'__version__ = "(.*)"', (ROOT / "clients/python/relay_client/__init__.py").read_text())
    assert found is not None and package["version"] == found[1]
