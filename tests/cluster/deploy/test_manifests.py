"""The files of cluster/deploy against the schemas of what reads them: Kubernetes, KubeRay, Compose, Ray."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from deployment import DEPLOY, documents, instructions, parse_headrace
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema
from referencing import Registry
from referencing.jsonschema import DRAFT202012

from headrace.cluster.serving.ray_serve import AppArgs

SCHEMAS = Path(__file__).parent / "schemas"
KUBERAY = DEPLOY / "kuberay"
MANIFESTS = sorted(p for p in KUBERAY.glob("*.yaml") if not p.name.endswith(".patch.yaml"))
COMPOSE = DEPLOY / "compose" / "compose.yaml"


@cache
def schema(name: str) -> Any:
    """With unknown fields as errors: an API server drops them, and what they were to do is not done."""
    return strict(json.loads((SCHEMAS / f"{name}.json").read_text()))


def strict(node: Any) -> Any:
    if isinstance(node, list):
        return [strict(each) for each in node]
    if not isinstance(node, dict):
        return node
    made = {key: strict(value) for key, value in node.items()}
    if isinstance(made.get("properties"), dict) and "additionalProperties" not in made:
        made["additionalProperties"] = bool(made.get("x-kubernetes-preserve-unknown-fields"))
    return made


def check(document: Any) -> None:
    kind = document["kind"]
    kinds = schema("kubernetes")["kinds"]
    if kind in kinds:
        wanted = {"$ref": f"kubernetes.json#/$defs/{kinds[kind]}"}
    else:
        wanted = {**schema(kind.lower())}
        # ObjectMeta is the API server's to check.
        wanted["properties"] = {**wanted["properties"], "metadata": {"type": "object"}}
    names = ("kubernetes", "raycluster")
    resources = [(f"{n}.json", DRAFT202012.create_resource(schema(n))) for n in names]
    jsonschema.Draft202012Validator(wanted, registry=Registry().with_resources(resources)).validate(
        document
    )


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: file.name)
def test_a_manifest_is_what_its_kind_takes(file: Path) -> None:
    for document in documents(file):
        check(document)
        if document["kind"] not in ("Namespace", "StorageClass", "PersistentVolume"):
            assert document["metadata"]["namespace"] == "headrace"


def test_the_schemas_see_mistakes() -> None:
    [cluster] = documents(KUBERAY / "raycluster.yaml")
    cluster["spec"]["authOptions"]["mod"] = "token"
    with pytest.raises(jsonschema.ValidationError, match="'mod' was unexpected"):
        check(cluster)
    policy = documents(KUBERAY / "networkpolicy.yaml")[0]
    policy["spec"]["ingress"][0]["form"] = []
    with pytest.raises(jsonschema.ValidationError, match="'form' was unexpected"):
        check(policy)


def pods(document: Any) -> list[Any]:
    """Pod specs of all of Ray's."""
    spec = document["spec"]
    cluster = spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec
    templates = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    found = [each["template"]["spec"] for each in templates]
    if "submitterPodTemplate" in spec:
        found.append(spec["submitterPodTemplate"]["spec"])
    return found


@pytest.mark.parametrize("name", ["raycluster", "rayservice", "rayjob"])
def test_clusters_have_tokens_and_pods_no_rights(name: str) -> None:
    [document] = documents(KUBERAY / f"{name}.yaml")
    spec = document["spec"]
    cluster = spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec
    assert cluster["authOptions"] == {"mode": "token", "secretName": "headrace-ray-token"}
    assert cluster["rayVersion"] == ray.__version__ == pinned("ray")
    for pod in pods(document):
        assert pod["securityContext"]["runAsNonRoot"] and not pod["automountServiceAccountToken"]
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            context = container["securityContext"]
            assert not context["allowPrivilegeEscalation"]
            assert context["capabilities"]["drop"] == ["ALL"]
            mounts = {mount["name"] for mount in container.get("volumeMounts", [])}
            assert mounts <= {volume["name"] for volume in pod.get("volumes", [])}


@pytest.mark.parametrize("patch", sorted(KUBERAY.glob("*.patch.yaml")), ids=lambda f: f.name)
def test_a_patch_gives_a_cluster(patch: Path) -> None:
    [cluster] = documents(KUBERAY / "raycluster.yaml")
    [change] = documents(patch)
    assert change["spec"].keys().isdisjoint(cluster["spec"].keys())  # so to merge is to add
    cluster["spec"] |= change["spec"]
    check(cluster)


def test_the_application_of_a_ray_service_is_ours() -> None:
    [service] = documents(KUBERAY / "rayservice.yaml")
    deployed = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    [application] = deployed.applications
    module, _, function = application.import_path.partition(":")
    assert module == AppArgs.__module__ and function == "build_app"
    args = AppArgs.model_validate(application.args)
    assert (
        args.engine.stages == service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["replicas"]
    )


def test_the_job_of_a_ray_job_is_a_command() -> None:
    [job] = documents(KUBERAY / "rayjob.yaml")
    words = job["spec"]["entrypoint"].split()
    assert words[:2] == ["headrace", "generate"]
    given = parse_headrace(words[1:])
    assert given["address"] == "auto"
    assert given["stages"] == job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"]


def test_compose_is_what_compose_takes() -> None:
    [compose] = documents(COMPOSE)
    jsonschema.validate(compose, json.loads((SCHEMAS / "compose-spec.json").read_text()))
    services = compose["services"]
    for name, service in services.items():
        assert service["security_opt"] == ["no-new-privileges:true"], name
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), f"{name}: {port} is open to other machines"
        for secret in service.get("secrets", []):
            assert secret in compose["secrets"]
    for name in ("head", "worker", "serve"):
        assert services[name]["environment"]["RAY_AUTH_MODE"] == "token"
    dockerfile = services["head"]["build"]["dockerfile"]
    context = (COMPOSE.parent / services["head"]["build"]["context"]).resolve()
    assert instructions(context / dockerfile)


@pytest.mark.parametrize("file", sorted((DEPLOY / "ray-up").glob("*.yaml")), ids=lambda f: f.name)
def test_ray_up_takes_its_files(file: Path) -> None:
    [config] = documents(file)
    validate_config(prepare_config(config))
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    for start in (*config["head_start_ray_commands"], *config["worker_start_ray_commands"]):
        assert start == "ray stop" or "RAY_AUTH_MODE=token" in start


def pinned(package: str) -> str:
    lines = (DEPLOY.parents[1] / "constraints.txt").read_text().splitlines()
    [version] = [line.split("==")[1] for line in lines if line.startswith(f"{package}==")]
    return version
