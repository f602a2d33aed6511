"""Makes the schemas beside this file of their projects' own: python shrink.py DEFINITIONS FILE...

DEFINITIONS is Kubernetes' _definitions.json, each other FILE a CustomResourceDefinition in YAML or a schema in
JSON. Descriptions are left out, and of Kubernetes all that no manifest of ours refers to.
"""

import json
import sys
from pathlib import Path
from typing import Any

import yaml

KINDS = {
    "Namespace": "io.k8s.api.core.v1.Namespace",
    "NetworkPolicy": "io.k8s.api.networking.v1.NetworkPolicy",
    "PersistentVolume": "io.k8s.api.core.v1.PersistentVolume",
    "PersistentVolumeClaim": "io.k8s.api.core.v1.PersistentVolumeClaim",
    "PodTemplateSpec": "io.k8s.api.core.v1.PodTemplateSpec",
    "StorageClass": "io.k8s.api.storage.v1.StorageClass",
}
HERE = Path(__file__).parent


def bare(schema: Any) -> Any:
    """Without descriptions; a property of that name is an object and stays."""
    if isinstance(schema, list):
        return [bare(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        k: bare(v)
        for k, v in schema.items()
        if not (k in ("description", "externalDocs", "example") and isinstance(v, str))
    }


def once(schema: dict[str, Any]) -> dict[str, Any]:
    """With a reference to RayCluster's, which is written before it, in place of its spec in others."""
    spec = schema["properties"]["spec"]["properties"]
    for name in {"rayClusterSpec", "rayClusterConfig"} & spec.keys():
        cluster = json.loads((HERE / "raycluster.json").read_text())["properties"]["spec"]
        if {**cluster, "type": "object"} == spec[name]:
            spec[name] = {"$ref": "raycluster.json#/properties/spec"}
    return schema


def references(schema: Any) -> set[str]:
    if isinstance(schema, list):
        return set().union(*map(references, schema)) if schema else set()
    if not isinstance(schema, dict):
        return set()
    found = references([*schema.values()])
    if isinstance(schema.get("$ref"), str):
        found.add(schema["$ref"].rpartition("/")[2])
    return found


def write(name: str, schema: Any) -> None:
    text = json.dumps(schema, separators=(",", ":"), sort_keys=True)
    (HERE / f"{name}.json").write_text(text + "\n")


def main(definitions: str, *crds: str) -> None:
    known = json.loads(Path(definitions).read_text())["$defs"]
    kept: dict[str, Any] = {}
    wanted = {*KINDS.values()}
    while wanted:
        name = wanted.pop()
        kept[name] = bare(known[name])
        wanted |= references(kept[name]) - kept.keys()
    write("kubernetes", {"$defs": kept, "kinds": KINDS})
    for file in crds:
        if file.endswith(".json"):
            write(Path(file).stem, bare(json.loads(Path(file).read_text())))
            continue
        for crd in yaml.safe_load_all(Path(file).read_text()):
            for version in crd["spec"]["versions"]:
                if version["name"] == "v1":
                    kind = crd["spec"]["names"]["kind"].lower()
                    write(kind, once(bare(version["schema"]["openAPIV3Schema"])))


if __name__ == "__main__":
    main(*sys.argv[1:])
