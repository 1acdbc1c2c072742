"""Makes kuberay.json beside this file, a JSON schema of KubeRay's RayCluster and RayJob, from the CRDs of its repository:

    python tests/deploy/kuberay.py KUBERAY/ray-operator/config/crd/bases VERSION

What is Kubernetes' own (pod templates, …) is left to the schemas of kubernetes-validate, by reference. Descriptions, and groups
of fields that no file of ours uses, are left out: a file that begins to use one fails its check until it stays, below.
KubeRay is under the Apache License 2.0.
"""

import json
import sys
from pathlib import Path
from typing import Any

import yaml

CORE = {
    "template": "PodTemplateSpec",
    "submitterPodTemplate": "PodTemplateSpec",
    "env": "EnvVar",
    "envFrom": "EnvFromSource",
    "securityContext": "SecurityContext",
    "volumeMounts": "VolumeMount",
}
LEFT_OUT = {"gcsFaultToleranceOptions", "headService", "historyServerOptions", "ingressOptions", "networkPolicy"}
KEPT = {"type", "enum", "required", "minimum", "minItems"}


def compact(schema: dict[str, Any], name: str = "") -> dict[str, Any]:
    """Strict: a field that is not in it is refused. name: of the field."""
    if name == "rayClusterSpec":
        return {"$ref": "kuberay.json#/RayCluster"}
    if name == "resources" and "requests" in schema.get("properties", {}):
        return _core("ResourceRequirements")
    if name in CORE:
        return {"type": "array", "items": _core(CORE[name])} if schema["type"] == "array" else _core(CORE[name])
    made = {key: value for key, value in schema.items() if key in KEPT}
    if fields := schema.get("properties"):
        made["properties"] = {key: compact(value, key) for key, value in fields.items() if key not in LEFT_OUT}
        made["additionalProperties"] = False
    elif values := schema.get("additionalProperties"):
        made["additionalProperties"] = compact(values)
    if items := schema.get("items"):
        made["items"] = compact(items)
    return made


def _core(kind: str) -> dict[str, str]:
    return {"$ref": f"_definitions.json#/$defs/io.k8s.api.core.v1.{kind}"}


def main(folder: str, version: str) -> None:
    made: dict[str, Any] = {"$comment": f"KubeRay {version}, by tests/deploy/kuberay.py"}
    for kind in ("RayCluster", "RayJob"):
        crd = yaml.safe_load((Path(folder) / f"ray.io_{kind.lower()}s.yaml").read_text())
        spec = next(v for v in crd["spec"]["versions"] if v["name"] == "v1")["schema"]["openAPIV3Schema"]["properties"]["spec"]
        made[kind] = compact(spec)
    Path(__file__).with_suffix(".json").write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
