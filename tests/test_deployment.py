"""What is deployed names files, versions, flags and routes that exist. No container engine is needed; what carries the
image's steps out is `scripts/check_image.py`, which is not run here."""

import importlib.util
import re
import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from steersman import demo
from steersman.server.app import attach_routes
from steersman.server.presets import load_presets
from steersman.server.serve import parse_arguments

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
FOLDERS = ("base", "demo", "tensor-parallel", "pod-monitor")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def _load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


@pytest.fixture(scope="module")
def image() -> ModuleType:
    """The script that reads the Dockerfile."""
    spec = importlib.util.spec_from_file_location("check_image", ROOT / "scripts" / "check_image.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def steps(image: ModuleType) -> list[tuple[str, str]]:
    return image.instructions((ROOT / "Dockerfile").read_text())


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], Any]:
    """`steersman serve`'s own parser; an unknown flag ends it."""
    # What vLLM sets for itself while it parses ends with the test.
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    return parse_arguments


def _server_of(compose: dict[str, Any], **environment: str) -> list[str]:
    """The server's command as compose makes it of the environment."""
    command = compose["services"]["server"]["command"]
    filled = re.sub(r"\$\{(\w+):[-?]([^}]*)\}", lambda match: environment.get(match[1], match[2]), command)
    return shlex.split(filled)


def _container(folder: str) -> dict[str, Any]:
    return _load(KUBERNETES / folder / "deployment.yaml")["spec"]["template"]["spec"]["containers"][0]


def test_images_are_built_of_files_that_exist_and_reach_the_builder(
    image: ModuleType, steps: list[tuple[str, str]]
) -> None:
    sources = [
        source for name, text in steps if name == "COPY" and "--from" not in text for source in text.split()[:-1]
    ]
    assert {"src", "server", "guidance", "kernels", "training"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists(), source
        assert image.allowed_in_context(source), source
    for private in (".git/config", ".env", ".venv/bin/python", "tests/conftest.py", "server/__pycache__/app.pyc"):
        assert not image.allowed_in_context(private), private


def test_images_have_the_versions_of_the_project(steps: list[tuple[str, str]]) -> None:
    text = " ".join(f"{name} {argument}" for name, argument in steps)
    vllm = next(d for d in PROJECT["optional-dependencies"]["cuda"] if d.startswith("vllm==")).removeprefix("vllm==")
    torch = re.search(r"^torch_version=(\S+)$", (ROOT / "scripts" / "setup.sh").read_text(), re.MULTILINE)
    assert torch is not None
    assert f"FROM vllm/vllm-openai:v{vllm} AS cuda" in text
    assert f"ARG TORCH_VERSION={torch[1]}" in text
    assert re.findall(r'image.version="([^"]*)"', text) == [PROJECT["version"]] * 2
    tags = [service["image"] for service in _load(ROOT / "compose.yaml")["services"].values()]
    tags += [argument.split()[0] for name, argument in steps if name == "FROM" and ":" in argument]
    for tag in tags:
        assert re.search(r":v?\d+\.\d+(\.\d+)?(-\w+)?$", tag), f"{tag} is not pinned"
    for folder in ("base", "demo"):
        (pinned,) = _load(KUBERNETES / folder / "kustomization.yaml")["images"]
        assert pinned["newTag"].startswith(f"{PROJECT['version']}-"), folder


def test_all_that_the_cpu_image_installs_is_locked(steps: list[tuple[str, str]]) -> None:
    locked = re.findall(r"^([\w.-]+)==", (ROOT / "requirements" / "cpu.lock").read_text(), re.MULTILINE)
    install = next(argument for _, argument in steps if "--constraint requirements/cpu.lock" in argument)
    left_out = re.search(r"printf '%s\\n' ([\w ]+) > unused.txt", install)
    assert left_out is not None
    assert not set(left_out[1].split()) & set(locked)
    needed = {re.split(r"[>=<]", d)[0] for d in (*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["cpu"])}
    assert needed - {"torch"} <= set(locked)


def test_images_run_as_a_user_of_their_own_and_stop_when_told(steps: list[tuple[str, str]]) -> None:
    starts = [place for place, (name, _) in enumerate(steps) if name == "FROM"]
    for start, end in zip(starts, [*starts[1:], len(steps)], strict=True):
        stage = dict(steps[start:end])
        if stage["FROM"].endswith(("AS cpu", "AS cuda")):
            assert stage["USER"] == "10001"
            assert stage["STOPSIGNAL"] == "SIGTERM"
            assert stage["ENTRYPOINT"] == '["tini", "--", "steersman"]'
            assert "http://127.0.0.1:8000/health" in stage["HEALTHCHECK"]


def test_the_cpu_image_compose_and_the_manifests_serve_the_demo(steps: list[tuple[str, str]], parse: Any) -> None:
    expected = parse([flag.replace(str(demo.WORLD), "/demo") for flag in demo.demo_flags(8000)])
    image_command = next(argument for name, argument in reversed(steps) if name == "CMD")
    commands = [yaml.safe_load(image_command), _server_of(_load(ROOT / "compose.yaml")), _container("demo")["args"]]
    for command in commands:
        assert command[0] == "serve"
        parsed = parse(command[1:])
        assert parsed.host == "0.0.0.0"
        for name in ("model", "served_model_name", "dtype", "max_model_len", "max_num_seqs", "enforce_eager", "port"):
            assert getattr(parsed, name) == getattr(expected, name), name
        for name in ("reward_model", "policy", "guidance_cache"):
            assert getattr(parsed, name) == getattr(expected, name), name


def test_commands_have_flags_that_exist(parse: Any) -> None:
    added = [
        operation["value"]
        for patch in _load(KUBERNETES / "tensor-parallel" / "kustomization.yaml")["patches"]
        for operation in yaml.safe_load(patch["patch"])
        if operation["path"].endswith("/args/-")
    ]
    own = {"STEERSMAN_SERVE": "org/model --reward-model helpful=org/reward"}
    compose = [
        _server_of({"services": _load(path)["services"]}, **own)
        for path in (ROOT / "compose.yaml", DEPLOY / "compose.cuda.yaml")
    ]
    for command in (*compose, [*_container("base")["args"], *added]):
        assert command[0] == "serve"
        parse(command[1:])


def test_probes_and_scrapes_ask_routes_that_exist(parse: Any) -> None:
    from steersman.server import vllm

    app = vllm.build_app(parse(["model"]), ("generate",), None)
    attach_routes(app)
    routes = {getattr(route, "path", None) for route in app.router.routes}
    container = _container("base")
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    probes = [container[name]["httpGet"] for name in ("startupProbe", "readinessProbe", "livenessProbe")]
    (scraped,) = _load(KUBERNETES / "pod-monitor" / "pod-monitor.yaml")["spec"]["podMetricsEndpoints"]
    for asked in (*probes, scraped):
        assert asked["path"] in routes
        assert ports[asked["port"]] == 8000
    assert f"--port={ports['http']}" in container["args"]
    jobs = {job["job_name"]: job for job in _load(DEPLOY / "prometheus" / "prometheus.yaml")["scrape_configs"]}
    assert jobs["steersman"]["static_configs"] == [{"targets": ["server:8000"]}]


@pytest.mark.parametrize("folder", ["base", "demo"])
def test_a_pod_is_killed_only_after_it_has_drained(folder: str) -> None:
    (drain,) = [int(a.partition("=")[2]) for a in _container(folder)["args"] if a.startswith("--shutdown-timeout=")]
    container = _container("base")
    pause = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    grace = _load(KUBERNETES / "base" / "deployment.yaml")["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace >= pause + drain + 20


def test_a_container_is_killed_only_after_it_has_drained(parse: Any) -> None:
    compose = _load(ROOT / "compose.yaml")
    grace = int(compose["services"]["server"]["stop_grace_period"].removesuffix("s"))
    assert grace >= parse(_server_of(compose)[1:]).shutdown_timeout + 20


def test_long_starts_are_waited_for() -> None:
    probe = _container("base")["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] >= 1200


def test_compose_and_grafana_are_given_what_they_name() -> None:
    compose = _load(ROOT / "compose.yaml")
    for name, service in compose["services"].items():
        assert service["read_only"] is True, name
        for mount in service["volumes"]:
            source, target = mount.split(":")[:2]
            assert (ROOT / source).is_dir() if source.startswith(".") else source in compose["volumes"], mount
            assert target.startswith("/")
        for other in service.get("depends_on", {}):
            assert other in compose["services"]
        for port in service["ports"]:
            assert "127.0.0.1" in port, f"{name} is open to the network"
    grafana = compose["services"]["grafana"]
    (mounted,) = [m.split(":")[1] for m in grafana["volumes"] if m.startswith("./deploy/grafana:")]
    assert grafana["environment"]["GF_PATHS_PROVISIONING"] == f"{mounted}/provisioning"
    provisioning = DEPLOY / "grafana" / "provisioning"
    (provider,) = _load(provisioning / "dashboards" / "steersman.yaml")["providers"]
    assert provider["options"]["path"] == f"{mounted}/dashboards"
    (source,) = _load(provisioning / "datasources" / "prometheus.yaml")["datasources"]
    assert (source["url"], source["uid"]) == ("http://prometheus:9090", "prometheus")
    prometheus = _load(DEPLOY / "prometheus" / "prometheus.yaml")
    assert prometheus["global"]["scrape_interval"] == source["jsonData"]["timeInterval"]
    for rules in prometheus["rule_files"]:
        assert "groups" in _load(DEPLOY / "prometheus" / rules)


def test_manifests_name_files_volumes_and_guidance_that_exist() -> None:
    for folder in FOLDERS:
        kustomization = _load(KUBERNETES / folder / "kustomization.yaml")
        named = [
            *kustomization.get("resources", ()),
            *(p["path"] for p in kustomization.get("patches", ()) if "path" in p),
        ]
        named += [file for made in kustomization.get("configMapGenerator", ()) for file in made["files"]]
        for name in named:
            assert (KUBERNETES / folder / name).exists(), f"{folder}: {name}"
    pod = _load(KUBERNETES / "base" / "deployment.yaml")["spec"]["template"]["spec"]
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in _container("base")["volumeMounts"]} == volumes
    assert load_presets(str(KUBERNETES / "base" / "presets.yaml"), ["helpful"], [])


def test_pods_have_no_rights_that_they_do_not_need() -> None:
    pod = _load(KUBERNETES / "base" / "deployment.yaml")["spec"]["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert _container("base")["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    for variable in _container("base")["env"]:
        assert "valueFrom" in variable, f"{variable['name']} is written into the manifest"
