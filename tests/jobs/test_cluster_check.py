"""`asyncrl doctor --cluster`: what nodes tell of themselves, and what of it would stop a run."""

import json
import os
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from asyncrl import cli
from asyncrl.jobs.cluster_check import NodeFacts, cluster_problems, odd_versions

VERSIONS = {"python": "3.11.2", "asyncrl": "0.1.0", "torch": "2.13.0", "ray": "2.60.0", "transformers": "5.12.1", "sglang": ""}
GOOD = NodeFacts(node="a 10.0.0.1", versions=VERSIONS, devices="8 CPUs", shm_free_bytes=8 << 30, skew_s=0.3, skew_within_s=0.01)

# Two nodes on this machine. The second one looks for the runs directory where it is not.
CLUSTER = """
import os, sys
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
import asyncrl.jobs.cluster_check as job
from asyncrl import cli

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
cluster.add_node(num_cpus=1, resources={"wrong": 1})
cluster.wait_for_nodes()

class Wrong(job.Probe):
    def facts(self, runs_dir, mark):
        return job.Probe.facts(self, runs_dir + "/none", mark)

right = job.Probe
probe = job._probe
def made(node, **options):
    job.Probe = Wrong if "wrong" in node["Resources"] else right
    return probe(node, **options)
job._probe = made
ray.cloudpickle.register_pickle_by_value(sys.modules["__main__"])
status = cli.main(["doctor", "--cluster", "--json", "--address", cluster.address, "--runs-dir", sys.argv[1]])
sys.stdout.flush()
left = sorted(path.name for path in Path(sys.argv[1]).iterdir())
cluster.shutdown()
print(left)
os._exit(status)
"""


def wrong(**changes: Any) -> NodeFacts:
    return replace(GOOD, node="b 10.0.0.2", **changes)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (wrong(), []),
        (wrong(versions=VERSIONS | {"sglang": "0.5.2"}), []),  # on generators' nodes alone
        (wrong(versions=VERSIONS | {"torch": "2.12.0"}), ["has 2.12.0 torch, and others have 2.13.0"]),
        (wrong(versions=VERSIONS | {"ray": ""}), ["has no ray, and others have 2.60.0"]),
        (
            wrong(reach="No such file or directory: /runs"),
            ["does not reach the runs directory (No such file or directory: /runs)"],
        ),
        (wrong(shm_free_bytes=64 << 20), ["64.0 MiB free in /dev/shm, of 1.0 GiB needed"]),
        (wrong(skew_s=-1.5, skew_within_s=0.6), []),  # it may be 0.9
        (wrong(skew_s=-1.5, skew_within_s=0.1), ["its clock is -1.5 s off (± 0.100 s)"]),
        (wrong(gloo="RuntimeError: timed out"), ["gloo: RuntimeError: timed out: open ports between the nodes"]),
        (wrong(nccl="not tried: its GPUs are in use"), []),
        (wrong(nccl="DistBackendError: no"), ["nccl: DistBackendError: no"]),
        (NodeFacts(node="b 10.0.0.2", error="ModuleNotFoundError: No module named 'asyncrl'"), ["No module named 'asyncrl'"]),
    ],
)
def test_what_would_stop_a_run(other: NodeFacts, said: list[str]) -> None:
    found = list(cluster_problems([GOOD, other, replace(GOOD, node="c 10.0.0.3")]))
    assert len(found) == len(said)
    assert all(one.startswith("b 10.0.0.2: ") and words in one for one, words in zip(found, said, strict=True))


def test_the_version_that_most_have_is_right() -> None:
    other = wrong(versions=VERSIONS | {"torch": "2.12.0"})
    assert odd_versions([other, GOOD, GOOD]) == {"torch": "2.13.0"}
    assert odd_versions([GOOD, GOOD]) == {}


def test_an_address_is_for_a_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--address", "10.0.0.1:6379"]) == 2
    assert "--address 10.0.0.1:6379 without --cluster" in capsys.readouterr().err


@pytest.mark.ray
def test_two_nodes_of_which_one_does_not_see_the_runs(tmp_path: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    done = subprocess.run(
        [sys.executable, "-c", CLUSTER, str(tmp_path)],
        env=environ, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    print(done.stdout, done.stderr)
    told, left = done.stdout.splitlines()[-2:]
    found = json.loads(told)
    assert left == "[]", "nothing of it stays in the runs directory"
    assert len(found["nodes"]) == 2
    for node in found["nodes"]:
        assert (node["error"], node["gloo"]) == ("", "")
        assert node["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
        assert abs(node["skew_s"]) <= node["skew_within_s"] + 0.05, "it is the same clock"
    assert (done.returncode, found["ok"], len(found["problems"])) == (1, False, 1)
    assert "does not reach the runs directory (No such file or directory" in found["problems"][0]
