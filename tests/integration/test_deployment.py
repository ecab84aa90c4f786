"""The files of ``config/``: each is read by its own tool, and says nothing that the relay does not know.

The proxies' files are run in ``tests/integration/test_reverse_proxies.py``; ``relay.toml`` is `test_config_example`'s.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import kubernetes_validate
import pytest
from ruamel.yaml import YAML

from relay.cli.masking import masked_settings
from relay.config_sections import LimitsConfig, PluginsConfig
from relay.config_sources import load
from relay.web.prometheus import METRIC_SPECS
from tests.support.node import SCRIPTS, compile_typescript, need_node
from tests.support.patience import PATIENCE
from tests.support.process import RelayProcess

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "config"
TOOLS = Path(sys.executable).parent
"""Of the development environment: hadolint and check-jsonschema are among its packages."""


def check(*command: str | Path) -> str:
    """Run a tool that must find nothing wrong; returns what it prints."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120 * PATIENCE)
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
        done = subprocess.run(
            [sys.executable, *command[1:]], env=environ, capture_output=True, check=False, timeout=60 * PATIENCE
        )
        assert (done.returncode == 0) is lives


def test_compose_file_follows_its_schema() -> None:
    check(TOOLS / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", CONFIG / "compose.yaml")


@pytest.mark.parametrize("name", ["Dockerfile", "compose.yaml", "relay.service", "kubernetes/deployment.yaml"])
def test_deployment_sets_no_variable_that_the_relay_refuses(name: str) -> None:
    text = (CONFIG / name).read_text()
    # Those in ${…} are Compose's own, for the ones beside them.
    environ = {
        match: "true" if match == "RELAY_ALLOW_ANONYMOUS" else ""
        for match in re.findall(r"(?<!\$\{)\bRELAY_[A-Z_]+\b", text)
    }
    # Some are named in comments as examples; their names must be right too.
    environ |= {
        "RELAY_ALLOWED_HOSTS": "[]",
        "RELAY_TRUSTED_PROXIES": "[]",
        "RELAY_HOST": "0.0.0.0",
        "RELAY_PORT": "8000",
        "RELAY_ALLOW_ANONYMOUS": "true",
    }
    done = subprocess.run(
        [sys.executable, "-c", "from relay.config_sources import load; load().check_exposure()"],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=60 * PATIENCE,
    )
    assert done.returncode == 0, done.stderr


# Kubernetes.


def manifests() -> dict[str, dict[str, Any]]:
    """The objects of the manifests by their kind, each of which they have once."""
    files = sorted((CONFIG / "kubernetes").iterdir())
    found: list[dict[str, Any]] = [each for file in files for each in YAML(typ="safe").load_all(file.read_text())]
    by_kind = {each["kind"]: each for each in found}
    assert len(by_kind) == len(found) > len(files) > 3
    return by_kind


@pytest.mark.parametrize("version", ["1.30", "1.33", "1.37"])
def test_manifests_are_what_kubernetes_understands(version: str) -> None:
    """Strictly: unknown fields are errors. 1.30 is the first with the sleep of preStop."""
    for manifest in manifests().values():
        kubernetes_validate.validate(manifest, version, strict=True)
    wrong = {**manifests()["Service"], "spec": {"selectors": {"app": "relay"}}}
    with pytest.raises(kubernetes_validate.ValidationError, match="selectors"):
        kubernetes_validate.validate(wrong, version, strict=True)


def test_autoscaler_counts_the_sockets_of_the_deployment() -> None:
    found = manifests()
    scaler = found["HorizontalPodAutoscaler"]["spec"]
    target = scaler["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", found["Deployment"]["metadata"]["name"])
    assert "replicas" not in found["Deployment"]["spec"], "they would be set back at each apply"
    names = {metric["pods"]["metric"]["name"] for metric in scaler["metrics"] if metric["type"] == "Pods"}
    assert names == {"relay_sockets"} <= known_metrics()
    assert "cpu" in container_of_the_pod()["resources"]["requests"], "a utilization is a part of what is requested"


def test_network_policy_lets_in_what_reaches_the_port_and_lets_out_to_redis() -> None:
    found = manifests()
    policy = found["NetworkPolicy"]["spec"]
    assert policy["podSelector"]["matchLabels"] == found["Service"]["spec"]["selector"]
    assert {port["port"] for rule in policy["ingress"] for port in rule["ports"]} == {"http"}
    assert {port["port"] for rule in policy["egress"] for port in rule["ports"]} == {6379, 53}


def container_of_the_pod() -> dict[str, Any]:
    (container,) = manifests()["Deployment"]["spec"]["template"]["spec"]["containers"]
    assert isinstance(container, dict)
    return container


def test_settings_in_kubernetes_are_accepted_for_a_public_address(tmp_path: Path) -> None:
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    for name in ("jwt-secret", "shared-secret"):
        (secrets / name).write_text("0123456789abcdef" * 4)
    file = tmp_path / "relay.toml"
    file.write_text(manifests()["ConfigMap"]["data"]["relay.toml"].replace("/run/secrets/relay", str(secrets)))
    settings = load(file, {"redis_url": "redis://redis:6379"})
    settings.check_exposure()
    assert container_of_the_pod()["ports"] == [{"name": "http", "containerPort": settings.port}]


def test_pods_mount_the_files_that_relay_reads() -> None:
    """The settings of its command line, and the secrets that they name; each volume exists."""
    container = container_of_the_pod()
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in manifests()["Deployment"]["spec"]["template"]["spec"]["volumes"]}
    assert mounts.keys() == volumes.keys()
    settings = manifests()["ConfigMap"]["data"]["relay.toml"]
    assert container["args"] == ["relay", "serve", "--config", f"{mounts['settings']}/relay.toml"]
    for item in volumes["secrets"]["secret"]["items"]:
        assert f"file:{mounts['secrets']}/{item['path']}" in settings


@pytest.mark.parametrize("file", ["docs/deployment.md", "config/kubernetes/deployment.yaml"])
def test_secret_is_created_with_all_that_pods_take_from_it(file: str) -> None:
    """A pod whose Secret lacks one does not start."""
    spec = manifests()["Deployment"]["spec"]["template"]["spec"]
    taken = {entry["valueFrom"]["secretKeyRef"]["key"] for entry in container_of_the_pod()["env"]}
    taken |= {item["key"] for volume in spec["volumes"] for item in volume.get("secret", {}).get("items", ())}
    assert set(re.findall(r"--from-literal=([\w-]+)=", (ROOT / file).read_text())) == taken


@pytest.mark.parametrize("probe", ["livenessProbe", "readinessProbe"])
def test_probes_of_the_pod_are_answered_without_a_key_and_under_any_host(probe: str) -> None:
    path = container_of_the_pod()[probe]["httpGet"]["path"]
    with RelayProcess(environ={"RELAY_REST__API_KEY": "s3cret-of-the-operators"}) as relay:
        request = Request(f"{relay.http}{path}", headers={"Host": "pod.example.org", "User-Agent": "kube-probe/1.31"})
        with urlopen(request, timeout=20) as response:
            assert response.status == 200


def test_pods_have_more_time_to_shut_down_than_relay_takes() -> None:
    """Before SIGTERM the hook; then the drain, handlers and services, and one slow plugin."""
    limits, pod = LimitsConfig(), manifests()["Deployment"]["spec"]["template"]["spec"]
    sleep_s = container_of_the_pod()["lifecycle"]["preStop"]["sleep"]["seconds"]
    shutdown_s = limits.drain_timeout_s + limits.close_timeout_s + PluginsConfig().timeout_s
    assert pod["terminationGracePeriodSeconds"] >= sleep_s + shutdown_s


def test_objects_in_kubernetes_select_the_pods() -> None:
    found = manifests()
    labels = found["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert found["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert found["Service"]["spec"]["selector"] == labels
    assert found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    (port,) = found["Service"]["spec"]["ports"]
    assert port["targetPort"] == "http"
    for path in found["Ingress"]["spec"]["rules"][0]["http"]["paths"]:
        assert path["backend"]["service"] == {"name": found["Service"]["metadata"]["name"], "port": {"name": "http"}}


def test_variables_of_services_do_not_reach_the_pods() -> None:
    assert manifests()["Deployment"]["spec"]["template"]["spec"]["enableServiceLinks"] is False


EXCERPT = re.compile(r"^<!-- not run: from config/(\S+) -->\n```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(
    ("name", "text"), [(found[1], found[3]) for found in EXCERPT.finditer((ROOT / "docs/deployment.md").read_text())]
)
def test_excerpts_in_the_documentation_are_those_of_the_files(name: str, text: str) -> None:
    assert text in (CONFIG / name).read_text()


def test_yaml_in_the_documentation_can_be_parsed() -> None:
    blocks = [
        (page.name, found)
        for page in (ROOT / "docs").glob("*.md")
        for found in re.findall(r"^```yaml\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    ]
    assert len(blocks) > 4
    for page, text in blocks:
        assert YAML(typ="safe").load(text), page


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


RUNBOOK = ROOT / "docs" / "runbook.md"


def test_each_alert_has_a_section_in_the_runbook_and_each_section_an_alert() -> None:
    rules = [
        rule
        for group in YAML(typ="safe").load((CONFIG / "alerts.yml").read_text())["groups"]
        for rule in group["rules"]
    ]
    names = [rule["alert"] for rule in rules]
    assert re.findall(r"^## (Relay\w+)$", RUNBOOK.read_text(), re.MULTILINE) == names
    assert re.findall(r"^\| \[(Relay\w+)\]", RUNBOOK.read_text(), re.MULTILINE) == names
    for rule in rules:
        assert rule["annotations"]["runbook_url"].endswith(f"/runbook.html#{rule['alert'].lower()}")


def test_runbook_names_metrics_and_settings_that_exist() -> None:
    text = RUNBOOK.read_text()
    known = {name.removesuffix("_bucket") for name in known_metrics()}
    assert set(re.findall(r"\brelay_\w+", text)) <= known
    fields = {name for name, _ in masked_settings(load(None, {"redis_url": "redis://x"}))}
    settings = {".".join(map(str, name)) for name in fields}
    for section in ("limits", "redis", "rest", "metrics", "auth", "plugins"):
        for name in re.findall(rf"`({section}\.[a-z_]+)`", text):
            assert name in settings, name


def test_rules_ask_for_metrics_that_exist() -> None:
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
    """The labels of each metric, by the name that Prometheus shows."""
    return {spec.shown_name: set(spec.labels) for spec in METRIC_SPECS}


def test_metrics_are_grouped_by_labels_that_they_have() -> None:
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


def test_dashboard_asks_for_metrics_that_exist() -> None:
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
