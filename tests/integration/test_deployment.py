"""The files of ``config/``: each is read by its own tool, and says nothing that the relay does not know.

The proxies' files are run in ``tests/integration/test_reverse_proxies.py``; ``relay.toml`` is `test_config`'s.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from relay.web.prometheus import FIGURES
from tests.support.node import SCRIPTS, compile_typescript, need_node
from tests.support.process import RelayProcess

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "config"
TOOLS = Path(sys.executable).parent
"""Of the development environment: hadolint and check-jsonschema are among its packages."""


def check(*command: str | Path) -> str:
    """Run a tool that must find nothing wrong; returns what it prints."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, f"{command[0]}:\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def need(tool: str) -> str:
    found = shutil.which(tool) or shutil.which(tool, path="/usr/sbin:/sbin")
    if found is None:
        pytest.skip(f"{tool} is not installed")
    return found


def known_metrics() -> set[str]:
    """All names of docs/metrics.md, which a test of its own holds against the code."""
    found: set[str] = set()
    for name, kind in re.findall(r"^\| `(\w+)`[^|]*\| (\w+) \|", (ROOT / "docs/metrics.md").read_text(), re.MULTILINE):
        found |= {f"{name}_{part}" for part in ("bucket", "sum", "count")} if kind == "histogram" else {name}
    assert len(found) > 20
    return found


def used_metrics(expressions: list[str]) -> set[str]:
    found = set(re.findall(r"\b(?:relay|process)_\w+", " ".join(expressions)))
    assert found
    return found


# The container.


def test_dockerfile_is_clean() -> None:
    check(TOOLS / "hadolint", CONFIG / "Dockerfile")


def dockerfile(instruction: str) -> str:
    """What the last such line says, or runs."""
    lines = [line for line in (CONFIG / "Dockerfile").read_text().splitlines() if line.startswith(f"{instruction} ")]
    return lines[-1].removeprefix(f"{instruction} ").rpartition(" CMD ")[2]


def test_container_is_not_run_by_root() -> None:
    """By number, so that a cluster can check it too."""
    assert int(dockerfile("USER")) > 0


def test_container_copies_what_a_wheel_is_made_of() -> None:
    """What hatchling reads, and nothing with a secret of somebody's: no `COPY . .`."""
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", (CONFIG / "Dockerfile").read_text(), re.MULTILINE)
    names = {name for line in copied for name in line.split()}
    assert names == {"requirements.lock", "pyproject.toml", "hatch_build.py", "README.md", "LICENSE", "relay"} | {
        "clients/browser"
    }
    assert all((ROOT / name).exists() for name in names)


@pytest.mark.parametrize("lives", [True, False])
def test_health_check_of_the_container_says_whether_the_relay_lives(lives: bool) -> None:
    command: list[str] = json.loads(dockerfile("HEALTHCHECK"))
    assert command[0] == "python"
    with RelayProcess() as relay:
        port = relay.http.rsplit(":", 1)[1]
        if not lives:
            relay.stop()
        # A proxy that somebody has set up for the daemon is no way to this very container.
        environ = {**os.environ, "RELAY_PORT": port, "http_proxy": "http://127.0.0.1:9", "no_proxy": ""}
        done = subprocess.run([sys.executable, *command[1:]], env=environ, capture_output=True, check=False, timeout=60)
        assert (done.returncode == 0) is lives


def test_compose_file_follows_its_schema() -> None:
    check(TOOLS / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", CONFIG / "compose.yaml")


@pytest.mark.parametrize("name", ["Dockerfile", "compose.yaml", "relay.service"])
def test_deployment_sets_no_variable_that_the_relay_refuses(name: str) -> None:
    text = (CONFIG / name).read_text()
    environ = {match: "true" if match == "RELAY_ANONYMOUS" else "" for match in re.findall(r"\bRELAY_[A-Z_]+\b", text)}
    # Some are named in comments as examples; their names must be right too.
    environ |= {"RELAY_ALLOWED_HOSTS": "[]", "RELAY_HOST": "0.0.0.0", "RELAY_PORT": "8000", "RELAY_ANONYMOUS": "true"}
    environ.pop("RELAY_API_KEY", None)  # compose's own, for the one below it
    done = subprocess.run(
        [sys.executable, "-c", "from relay.config_sources import load; load().check_exposure()"],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


# systemd.


def test_unit_is_what_systemd_understands(tmp_path: Path) -> None:
    systemd = need("systemd-analyze")
    unit = tmp_path / "relay.service"
    unit.write_text((CONFIG / "relay.service").read_text().replace("/opt/relay/bin/relay", str(TOOLS / "relay")))
    assert check(systemd, "verify", unit) == ""
    exposure = re.search(
        r"exposure level for relay.service: ([0-9.]+)", check(systemd, "security", "--offline=true", unit)
    )
    assert exposure is not None and float(exposure[1]) < 2, "of 10"


# Prometheus and Grafana.


def test_rules_are_what_prometheus_understands() -> None:
    check(need("promtool"), "check", "rules", CONFIG / "alerts.yml")


def test_scrape_configuration_is_what_prometheus_understands(tmp_path: Path) -> None:
    text = (CONFIG / "prometheus.yml").read_text()
    key = tmp_path / "key"
    key.write_text("k")
    (tmp_path / "prometheus.yml").write_text(text.replace("/etc/prometheus/relay-metrics-key", str(key)))
    shutil.copy(CONFIG / "alerts.yml", tmp_path)
    check(need("promtool"), "check", "config", tmp_path / "prometheus.yml")


def test_rules_ask_for_figures_that_exist() -> None:
    expressions = re.findall(r"^ *expr: (.*)$", (CONFIG / "alerts.yml").read_text(), re.MULTILINE)
    assert used_metrics(expressions) <= known_metrics()


def dashboard() -> str:
    return (CONFIG / "dashboard.json").read_text()


def test_dashboard_follows_grafanas_own_types(tmp_path: Path) -> None:
    """Those of its npm package; what they name by an enum stands in JSON as the enum's values."""
    need_node()
    source = tmp_path / "dashboard.ts"
    source.write_text(f"""
import type {{ Dashboard }} from "@grafana/schema"
type Plain<T> = T extends string ? `${{T}}` : T extends object ? {{ [K in keyof T]: Plain<T[K]> }} : T
export const dashboard = {dashboard().strip()} satisfies Plain<Dashboard>
""")
    types = SCRIPTS / "node_modules/@grafana/schema/dist/types/index.d.ts"
    compile_typescript(tmp_path, source, **{"@grafana/schema": types})


def labels_of() -> dict[str, set[str]]:
    """The labels of each figure, by the name that Prometheus shows."""
    return {figure.shown_name: {figure.label} - {""} for figure in FIGURES}


def test_figures_are_grouped_by_labels_that_they_have() -> None:
    """By another label all would fall into one group, and nobody would be told."""
    rules = re.findall(r"^ *expr: (.*)$", (CONFIG / "alerts.yml").read_text(), re.MULTILINE)
    expressions = [*rules, *(target["expr"] for panel in panels() for target in panel["targets"])]
    grouped = 0
    for expression in expressions:
        for labels, name in re.findall(r"by \(([^)]*)\) \((?:\w+\()?(\w+)", expression):
            known = labels_of().get(name) or labels_of().get(name.removesuffix("_bucket"), set())
            assert set(re.split(r", *", labels)) - {"instance", "job", "le"} <= known, expression
            grouped += 1
    assert grouped > 5


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(dashboard())["panels"]
    return found


def test_dashboard_asks_for_figures_that_exist() -> None:
    expressions = [target["expr"] for panel in panels() for target in panel["targets"]]
    assert used_metrics(expressions) <= known_metrics()


def test_expressions_of_the_dashboard_are_what_prometheus_understands(tmp_path: Path) -> None:
    """As rules, since that is what its tool reads; Grafana's own variables stand for numbers."""
    promtool = need("promtool")
    rules = [
        {"record": "x", "expr": target["expr"].replace("$__rate_interval", "1m")}
        for panel in panels()
        for target in panel["targets"]
    ]
    file = tmp_path / "rules.json"  # which is YAML too
    file.write_text(json.dumps({"groups": [{"name": f"g{n}", "rules": [rule]} for n, rule in enumerate(rules)]}))
    check(promtool, "check", "rules", file)


def test_panels_of_the_dashboard_stand_side_by_side() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {(place["x"] + right, place["y"] + down) for right in range(place["w"]) for down in range(place["h"])}
        assert not taken & cells, f"{panel['title']} lies on another"
        taken |= cells
        assert panel["description"] and panel["title"]
    assert len({panel["id"] for panel in panels()}) == len(panels())
