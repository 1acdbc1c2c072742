"""A run on nodes of which one drains and the next is lost; for test_elastic.py, in a process that has its own Ray.

    python lost_nodes.py RECIPE.json RUNS_DIR

Prints what became of it, as a line of JSON.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import ray
from ray.cluster_utils import Cluster

from asyncrl import Recipe, Trainer
from asyncrl.config import Deployment, EngineSpec, GeneratorsSpec, LimitsSpec, PlaceSpec
from asyncrl.report.summary import RunSummary

SPOT = {"num_cpus": 1, "resources": {"place": 2}, "labels": {"market": "spot"}}
LABELS = {"labels": {"market": "spot"}, "fallback": ({"market": "on-demand"},)}


class Seen:
    """The generators that are up, by pid, and the most updates that were made while there was none."""

    def __call__(self, run: RunSummary) -> None:
        self.run = run
        self.up = {pid for name, pid in run.pids.items() if name.startswith("generator")}


def lead(recipe: Recipe, runs_dir: str, cluster: Cluster) -> dict[str, object]:
    first = cluster.add_node(**SPOT)
    place = PlaceSpec(resources={"place": 1}, **LABELS)
    deployment = Deployment(
        ray_address=cluster.address,
        generators=GeneratorsSpec(count=2, engine=EngineSpec(slots=8, max_length=40), place=place),
        limits=LimitsSpec(poll_s=0.5, max_restarts=0),
    )
    seen, nodes = Seen(), []
    with Trainer(recipe, deployment, runs_dir=runs_dir, observe=seen, progress=False) as trainer:
        fleet = trainer._supervisor._fleet

        def fit_until(holds: Callable[[], bool]) -> None:
            while not holds():
                trainer.fit(1)
            nodes.append(sorted({member.node for member in fleet.members if member.role == "generator"}))

        fit_until(lambda: len(seen.up) == 2)
        second, before = cluster.add_node(**SPOT), seen.up
        drain = [
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            "drain-node",
            "--address",
            cluster.address,
            "--node-id",
            first.node_id,
        ]
        reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot", "--deadline-remaining-seconds", "60"]
        subprocess.run([*drain, *reason], check=True)
        fit_until(lambda: len(seen.up) == 2 and not seen.up & before)
        before = seen.up
        cluster.remove_node(first)
        cluster.remove_node(second, allow_graceful=False)
        cluster.add_node(**SPOT | {"labels": {"market": "on-demand"}})
        fit_until(lambda: len(seen.up) == 2 and not seen.up & before)
        trainer.fit(2)
        result = trainer.finish()
    return {"result": msgspec.to_builtins(result), "nodes": nodes, "spot": [first.node_id, second.node_id]}


def main() -> None:
    cluster = Cluster(initialize_head=True, connect=False, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
        print(json.dumps(lead(msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Recipe), sys.argv[2], cluster)))
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main()
