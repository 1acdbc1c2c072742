"""What deploy/kuberay holds, against KubeRay's fields (kuberay.json), Kubernetes' own (kubernetes-validate), and each other."""

import json
import os
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

from asyncrl.config import Deployment, PlaceSpec
from asyncrl.config.load import load_deployment
from asyncrl.generate.sglang.sglang_kind import SGLangKind

ROOT = Path(__file__).resolve().parents[2]
KUBERAY = ROOT / "deploy" / "kuberay"
KUBERNETES = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema" / "v1.33.0-local-strict"
SPOT = "ray.io/market-type"


def manifest(name: str) -> dict[str, Any]:
    return yaml.safe_load((KUBERAY / name).read_text())


def patched(target: Any, patch: Any) -> Any:
    """A JSON merge patch (RFC 7386), as `kubectl patch --type=merge` applies it."""
    if not isinstance(patch, dict):
        return patch
    made = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        made.pop(key, None) if value is None else made.update({key: patched(made.get(key), value)})
    return made


def sidecar() -> dict[str, Any]:
    return patched(manifest("rayjob.yaml"), manifest("sidecar.yaml"))


@cache
def schemas() -> Registry:
    files = {"kuberay.json": Path(__file__).with_name("kuberay.json"), "_definitions.json": KUBERNETES / "_definitions.json"}
    found = {name: Resource.from_contents(json.loads(file.read_text()), DRAFT202012) for name, file in files.items()}
    return Registry().with_resources(found.items())


def problems(spec: dict[str, Any], kind: str) -> list[str]:
    validator = jsonschema.Draft202012Validator({"$ref": f"kuberay.json#/{kind}"}, registry=schemas())
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(spec)]


def pods(cluster: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Specs of the pods of a RayCluster's spec, by group."""
    groups = {"head": cluster["headGroupSpec"]} | {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    return {name: group["template"]["spec"] for name, group in groups.items()}


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    return manifest("raycluster.yaml")["spec"]


@pytest.mark.parametrize("make", [lambda: manifest("raycluster.yaml"), lambda: manifest("rayjob.yaml"), sidecar])
def test_every_field_is_known_and_of_its_type(make):
    made = make()
    assert made["apiVersion"] == "ray.io/v1"
    assert problems(made["spec"], made["kind"]) == []


def test_the_claim_is_one_of_kubernetes_and_many_nodes_may_write_to_it():
    claim = manifest("storage.yaml")
    schema = json.loads((KUBERNETES / "persistentvolumeclaim-v1.json").read_text())
    jsonschema.Draft202012Validator(schema, registry=schemas()).validate(claim)
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("workerGroupSpecs.0.minReplica", 1),
        ("workerGroupSpecs.0.minReplicas", "1"),
        ("workerGroupSpecs.0.labels", {"a": 1}),
        ("autoscalerOptions.version", "v3"),
        ("authOptions.mode", "k8s"),
        ("headGroupSpec.template.spec.containers.0.livenessProbe.httpGet.timeoutSeconds", 2),
        ("headGroupSpec.template.spec.volumes.0.emptyDir", {"sizelimit": "1Gi"}),
        ("workerGroupSpecs.0.template.spec.terminationGracePeriod", 60),
    ],
)
def test_what_is_misspelt_or_ill_typed_is_found(cluster, path, value):
    """The schemas are strict at every level, KubeRay's own and Kubernetes'."""
    broken = json.loads(json.dumps(cluster))
    node: Any = broken
    *parents, leaf = path.split(".")
    for part in parents:
        node = node[int(part) if isinstance(node, list) else part]
    node[leaf] = value
    assert len(problems(broken, "RayCluster")) == 1


def test_a_job_and_a_cluster_are_the_same_cluster(cluster):
    assert manifest("rayjob.yaml")["spec"]["rayClusterSpec"] == cluster


def test_what_kuberay_refuses_beside_its_schema(cluster):
    """From validation.go of KubeRay 1.7."""
    for name, pod in pods(cluster).items():
        assert pod["restartPolicy"] == "Never", name  # with autoscaler v2
    for group in cluster["workerGroupSpecs"]:
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    assert cluster["rayVersion"] >= "2.52.0"  # for tokens
    job = manifest("rayjob.yaml")["spec"]
    assert job["shutdownAfterJobFinishes"]  # without it no ttlSecondsAfterFinished
    assert job["ttlSecondsAfterFinished"] >= 0
    assert job["submitterPodTemplate"]["spec"]["restartPolicy"] == "Never"
    assert sidecar()["spec"].keys() & {"submitterPodTemplate", "submitterConfig", "clusterSelector"} == set()


def test_every_pod_is_unprivileged_and_shares_the_runs(cluster):
    claim = manifest("storage.yaml")["metadata"]["name"]
    submitter = {"submitter": manifest("rayjob.yaml")["spec"]["submitterPodTemplate"]["spec"]}
    for name, pod in (pods(cluster) | submitter).items():
        (container,) = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"], name
        assert pod["securityContext"]["runAsUser"] == 1000, name  # as in the images
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        if name == "submitter":
            continue
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert volumes[mounts["/runs"]]["persistentVolumeClaim"]["claimName"] == claim
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
        assert volumes[mounts["/etc/asyncrl"]]["configMap"]["name"] == "asyncrl"
        assert container["resources"]["requests"] == container["resources"]["limits"]
        if name != "head":
            _, file, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
            assert (KUBERAY / Path(file).name).is_file()
            assert int(seconds) + 15 < pod["terminationGracePeriodSeconds"]  # for Ray's own end


def nodes(cluster: dict[str, Any]) -> list[tuple[dict[str, str], dict[str, float]]]:
    """Labels and resources of the workers that a cluster begins with."""
    found = []
    for group in cluster["workerGroupSpecs"]:
        asked = group["template"]["spec"]["containers"][0]["resources"]["requests"]
        room = {"CPU": float(asked["cpu"]), "GPU": float(asked["nvidia.com/gpu"])}
        found += [(group["labels"], dict(room)) for _ in range(group["minReplicas"])]
    return found


def unplaced(deployment: Deployment, free: list[tuple[dict[str, str], dict[str, float]]]) -> list[str]:
    """Actors for which there is no room, each placed on the first node that has its labels and room."""
    generators, rewards = deployment.generators, deployment.rewards
    wanted: list[tuple[str, int, PlaceSpec]] = [(name, of.ranks, of.place) for name, of in deployment.groups.items()]
    wanted += [("generator", generators.least, generators.place), ("rewards", rewards.least, rewards.place)]
    left = []
    for name, count, place in wanted:
        for _ in range(count):
            for labels, room in free:
                fits = room["CPU"] >= place.cpus and room["GPU"] >= place.gpus
                if fits and place.labels.items() <= labels.items():
                    room["CPU"] -= place.cpus
                    room["GPU"] -= place.gpus
                    break
            else:
                left.append(name)
    return left


def test_what_the_deployment_asks_for_is_there_from_the_start(cluster):
    """A run ends where an actor fits no node that there is, so it can't wait for nodes to be added."""
    deployment = load_deployment(KUBERAY / "deployment.yaml")
    assert SGLangKind({}).check(deployment).startswith("sglang: 2 to 8 × 1 servers, tensor parallel 1, ")
    assert unplaced(deployment, nodes(cluster)) == []
    assert unplaced(deployment, nodes(cluster)[:-1]) != []  # none is idle
    most = {group["groupName"]: group["maxReplicas"] for group in cluster["workerGroupSpecs"]}
    assert deployment.generators.most <= most["generators"]  # a node has one GPU
    assert deployment.learner.place.labels == {SPOT: "on-demand"}
    labels = [group["labels"] for group in cluster["workerGroupSpecs"]]
    assert all(choice in labels for choice in deployment.generators.place.choices)
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert all(place.cpus > 0 for place in (deployment.rewards.place, deployment.generators.place, deployment.learner.place))


def test_the_launchers_cluster_has_room_for_the_same_deployment():
    types = yaml.safe_load((ROOT / "deploy" / "ray-up.yaml").read_text())["available_node_types"].values()
    free = [(kind["labels"], {"GPU": 0, **kind["resources"]}) for kind in types for _ in range(kind.get("min_workers", 0))]
    assert unplaced(load_deployment(KUBERAY / "deployment.yaml"), free) == []


@pytest.mark.parametrize(("steps", "resumed"), [([], False), (["step_000000"], True), (["step_000000", "step_000040"], True)])
def test_a_second_try_goes_on_from_the_checkpoints(tmp_path, steps, resumed):
    for step in steps:
        (tmp_path / "runs" / "gsm8k" / "checkpoints" / step).mkdir(parents=True)
    said = run_script(tmp_path, "run.sh", "asyncrl", "gsm8k", "/r/gsm8k.py", "learner.lr=2e-6")
    expected = f"run /r/gsm8k.py learner.lr=2e-6 --deploy {KUBERAY}/deployment.yaml --runs-dir {tmp_path}/runs"
    assert said == f"{expected} --name gsm8k" + (" --resume" if resumed else "")


def test_a_worker_that_stops_is_drained_first(tmp_path):
    said = run_script(tmp_path, "drain.sh", "ray", "0")
    assert said.startswith("drain-node --reason DRAIN_NODE_REASON_PREEMPTION ")
    assert said.endswith(" --deadline-remaining-seconds 0")


def run_script(folder: Path, script: str, command: str, *arguments: str) -> str:
    """What the script gives to the command that it starts."""
    stub = folder / command
    stub.write_text('#!/bin/sh\necho "$@"\n')
    stub.chmod(0o755)
    environ = {"PATH": f"{folder}:{os.environ['PATH']}", "RUNS": f"{folder}/runs"}
    done = subprocess.run(["sh", KUBERAY / script, *arguments], env=environ, capture_output=True, text=True, check=True)
    return done.stdout.strip()
