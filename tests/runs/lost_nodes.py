"""A run on nodes of which one drains and the next is killed without a word; for test_elastic.py, in a process with its own Ray.

    python lost_nodes.py RECIPE.json RUNS_DIR

Prints what became of it, as a line of JSON.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import ray
from ray.cluster_utils import Cluster

from asyncrl import Recipe, Trainer
from asyncrl.cluster.forkserver import forkserver
from asyncrl.cluster.session import WORKER_MODULES
from asyncrl.config import Deployment, EngineSpec, GeneratorsSpec, LimitsSpec, PlaceSpec, RanksSpec, RewardsSpec
from asyncrl.report.summary import RunSummary

SPOT: dict[str, Any] = {"num_cpus": 1, "resources": {"place": 2, "rank": 1}, "labels": {"market": "spot"}}
HEAD = PlaceSpec(labels={"market": "on-demand"})


class Generators:
    """Those that are up, by pid."""

    up: set[int] = set()

    def __call__(self, run: RunSummary) -> None:
        self.up = {pid for name, pid in run.pids.items() if name.startswith("generator")}


def drain(cluster: Cluster, node: str) -> None:
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", cluster.address, "--node-id", node]
    reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot", "--deadline-remaining-seconds", "60"]
    subprocess.run([*command, *reason], check=True, stdout=sys.stderr)


def lead(recipe: Recipe, runs_dir: str, cluster: Cluster) -> dict[str, object]:
    head, first = cluster.head_node.node_id, cluster.add_node(**SPOT)
    engine = EngineSpec(slots=8, max_length=40, stream_interval=2)
    deployment = Deployment(
        ray_address=cluster.address,
        generators=GeneratorsSpec(count=2, engine=engine, place=PlaceSpec(resources={"place": 1}, labels=SPOT["labels"])),
        rewards=RewardsSpec(place=HEAD),
        learner=RanksSpec(ranks=2, place=PlaceSpec(resources={"rank": 1})),  # one on the head
        limits=LimitsSpec(poll_s=0.5, max_restarts=1),
    )
    generators, nodes = Generators(), []
    with Trainer(recipe, deployment, runs_dir=runs_dir, observe=generators, progress=False) as trainer:

        def on(*roles: str) -> set[str]:
            return {member.node for member in trainer._supervisor._fleet.members if member.role in roles}

        def fit_until(holds: Callable[[], bool]) -> set[int]:
            while not holds():
                trainer.fit(1)
            nodes.append(sorted(on("generator")))
            return generators.up

        before = fit_until(lambda: len(generators.up) == 2)
        second = cluster.add_node(**SPOT)
        drain(cluster, first.node_id)
        before = fit_until(lambda: len(generators.up - before) == 2 and on("learner", "rank") == {head, second.node_id})
        cluster.remove_node(first)
        cluster.remove_node(second, allow_graceful=False)
        cluster.add_node(**SPOT)
        fit_until(lambda: len(generators.up - before) == 2)
        trainer.fit(2)
        result = trainer.finish()
    return {"result": msgspec.to_builtins(result), "nodes": nodes, "spot": [first.node_id, second.node_id]}


def main() -> None:
    head = {"num_cpus": 1, "include_dashboard": False, "labels": HEAD.labels, "resources": {"rank": 1}}
    cluster = Cluster(initialize_head=True, connect=False, head_node_args=head)
    with forkserver(WORKER_MODULES) as executable:
        try:
            own = {"runtime_env": {"py_executable": executable}}
            ray.init(address=cluster.address, log_to_driver=False, logging_level="error", **own)
            print(json.dumps(lead(msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Recipe), sys.argv[2], cluster)))
        finally:
            ray.shutdown()
            cluster.shutdown()


if __name__ == "__main__":
    main()
