"""What can be known of images and manifests without building or applying them: closed, pinned, whole, and valid."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
import yaml

from tests.simulators.agent import AgentProcess, install_version

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILES = [DEPLOY / "edge/Dockerfile", DEPLOY / "server/Dockerfile"]
MANIFESTS = [DEPLOY / "edge/kubernetes.yaml", DEPLOY / "server/kubernetes.yaml"]
SCHEMAS = json.loads((ROOT / "tests/data/kubernetes-1.31.json").read_text())
each_dockerfile = pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.parent.name)
each_manifest = pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.parent.name)


def parse(path: Path) -> list[tuple[str, str]]:
    """Return the instructions of a Dockerfile and their arguments."""
    text = re.sub(r"(?m)^#.*\n", "", path.read_text()).replace("\\\n", " ")
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in text.splitlines() if line)]


def list_documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def list_containers(path: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield each pod with each of its containers, the ones before it too."""
    for document in list_documents(path):
        pod = document.get("spec", {}).get("template", {}).get("spec", {})
        for container in [*pod.get("initContainers", ()), *pod.get("containers", ())]:
            yield pod, container


def check_image(name: str) -> None:
    first = name.split("/", maxsplit=1)[0]
    assert "/" not in name or not set(first) & set(".:"), f"{name} names a registry"
    assert first != "localhost"
    assert not name.endswith(":latest")


@each_dockerfile
def test_an_image_runs_as_nobody_and_from_what_is_pinned(path: Path) -> None:
    instructions = parse(path)
    bases = [rest.split()[0] for name, rest in instructions if name == "FROM"]
    for image in bases:
        check_image(image)
        assert ":" in image, "a base without a tag"
    user = [rest for name, rest in instructions if name == "USER"][-1]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
    after = [name for name, _ in instructions][[name for name, _ in instructions].index("USER") :]
    assert not {"RUN", "COPY", "ADD"} & set(after)
    for _, command in (each for each in instructions if each[0] == "RUN"):
        assert command.count("pip install") == command.count("--no-cache-dir --constraint constraints.txt")
        assert command.count("apt-get install") == command.count("--no-install-recommends")
    for name, command in instructions:
        if name in {"CMD", "ENTRYPOINT"}:
            assert isinstance(json.loads(command), list), "a shell would keep signals from the service"


@each_dockerfile
def test_what_an_image_copies_is_there_and_in_its_context(path: Path) -> None:
    kept = {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"}
    sources = [rest.split()[:-1] for name, rest in parse(path) if name == "COPY" and not rest.startswith("--from")]
    assert sources
    for source in (each for names in sources for each in names):
        assert (ROOT / source).exists()
        assert source in kept


def test_the_context_of_an_image_is_nothing_that_is_not_named() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    assert not [line for line in lines if "key" in line or ".venv" in line]


@each_manifest
def test_a_manifest_is_valid_in_kubernetes_own_schema(path: Path) -> None:
    for document in list_documents(path):
        kind = SCHEMAS["kinds"][f"{document['apiVersion']}/{document['kind']}"]
        jsonschema.validate(document, {**SCHEMAS, "$ref": f"#/$defs/{kind}"}, jsonschema.Draft202012Validator)


def test_the_schema_would_find_a_key_that_kubernetes_does_not_know() -> None:
    document = list_documents(MANIFESTS[0])[0]
    document["spec"]["template"]["spec"]["containers"][0]["livenessprobe"] = {}
    with pytest.raises(jsonschema.ValidationError, match="livenessprobe"):
        jsonschema.validate(document, {**SCHEMAS, "$ref": "#/$defs/io.k8s.api.apps.v1.DaemonSet"})


@each_manifest
def test_a_pod_is_closed_and_watched(path: Path) -> None:
    for pod, container in list_containers(path):
        check_image(container["image"])
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["automountServiceAccountToken"] is False
        assert container["securityContext"]["readOnlyRootFilesystem"]
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        names = {volume["name"] for volume in pod["volumes"]} | {"federation"}
        assert {mount["name"] for mount in container["volumeMounts"]} <= names
        if container in pod["containers"]:
            assert {"livenessProbe", "readinessProbe"} <= container.keys()
            assert "memory" in container["resources"]["limits"]


def test_there_is_one_coordinator_and_it_keeps_its_volume() -> None:
    (coordinator,) = [each for each in list_documents(MANIFESTS[1]) if each["kind"] == "StatefulSet"]
    assert coordinator["spec"]["replicas"] == 1
    (claim,) = coordinator["spec"]["volumeClaimTemplates"]
    mounts = coordinator["spec"]["template"]["spec"]["containers"][0]["volumeMounts"]
    assert (claim["metadata"]["name"], "/var/lib/fl-server") in {(each["name"], each["mountPath"]) for each in mounts}


def test_probes_are_answered_by_a_real_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_AGENT_HTTP__HOST", "0.0.0.0")
    device = AgentProcess(tmp_path / "device")
    device.state_dir.mkdir()
    install_version(device.state_dir)
    ((_, container),) = list_containers(MANIFESTS[0])
    with device:
        for name in ("startupProbe", "livenessProbe", "readinessProbe"):
            probe = container[name]["httpGet"]
            headers = {each["name"]: each["value"] for each in probe["httpHeaders"]}
            assert httpx.get(f"{device.url}{probe['path']}", headers=headers).status_code == 200
        assert httpx.get(f"{device.url}{probe['path']}", headers={"Host": "10.0.0.7:8080"}).status_code == 403


def test_services_of_the_compose_file_are_closed_and_their_files_there() -> None:
    document = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    assert document["services"].keys() == {"server", "broker", "proxy", "device-1"}
    for service in document["services"].values():
        check_image(service["image"])
        assert (service["read_only"], service["cap_drop"], service["tmpfs"]) == (True, ["ALL"], ["/tmp"])
        if "build" in service:
            assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:")
