"""Runs with long-tailed answers on several Ray nodes of one machine, for bench_nodes.py and bench_elastic.py.

A decode step of their engines waits STEP_S (of the environment, else 0.1), as if a device computed: so engines work beside each
other although they share few cores, and what a run makes follows their number. The node of the driver, the learner and the
reward is labelled `head`; generators need the resource `place` of another node.
"""

import functools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc
import ray
from bench_faults import Can, check, make_inputs
from msgspec.structs import asdict
from ray.cluster_utils import Cluster

from asyncrl import Recipe, RunResult, Trainer
from asyncrl.cluster.forkserver import forkserver
from asyncrl.cluster.session import WORKER_MODULES
from asyncrl.config import (
    CheckpointSpec,
    CountRange,
    DataSpec,
    Deployment,
    EngineSpec,
    GeneratorsSpec,
    LearnerSpec,
    LimitsSpec,
    ModelSpec,
    PlaceSpec,
    RanksSpec,
    RewardSpec,
    RewardsSpec,
    SamplingSpec,
    StalenessSpec,
)
from asyncrl.replay import open as open_replay
from asyncrl.report.summary import RunSummary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STEP_S = float(os.environ.get("STEP_S", "0.1"))
SLOTS, MAX_LAG, LONGEST = 8, 4, 128
HEAD = PlaceSpec(labels={"where": "head"})


def waiting(spec: ModelSpec) -> "PreTrainedModel":
    """A builder of models whose decode steps take STEP_S longer."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(spec.path, dtype=getattr(torch, spec.dtype), attn_implementation="sdpa")
    forward = model.forward

    @functools.wraps(forward)
    def stepped(*arguments: Any, **named: Any) -> Any:
        if named.get("past_key_values") is not None and named["input_ids"].shape[1] == 1:
            time.sleep(STEP_S)
        return forward(*arguments, **named)

    model.forward = stepped
    return model


def make_recipe(folder: Path) -> Recipe:
    """Over inputs in the folder, which are made. One answer in 17 ends with each token: the median is 12, and one in a hundred
    has 76 or more. So slow a learner leaves that as it is."""
    make_inputs(folder, Can(disk=False, net=False, clock=False), spread=0.02)
    return Recipe(
        name="run",
        model=ModelSpec(path=str(folder / "model"), builder=f"{Path(__file__).resolve()}:waiting"),
        data=DataSpec(files=(str(folder / "train.jsonl"),), answer_key="answer", max_prompt_length=8),
        reward=RewardSpec(function=f"{folder}/sevens.py:compute_score"),
        sampling=SamplingSpec(n=4, max_response_length=LONGEST),
        staleness=StalenessSpec(max_lag=MAX_LAG),
        learner=LearnerSpec(batch_groups=4, lr=1e-6),
        checkpoint=CheckpointSpec(save_freq=50, keep_last_n=2),
        total_steps=1_000_000,
    )


def deployment(
    cluster: Cluster, count: int | CountRange, slots: int = SLOTS, longest: int = LONGEST, **limits: float
) -> Deployment:
    """`max_restarts=0`: a node that is lost and counts as a failure ends the run."""
    engine = EngineSpec(slots=slots, max_length=longest + 12, stream_interval=8)
    return Deployment(
        ray_address=cluster.address,
        generators=GeneratorsSpec(count=count, engine=engine, place=PlaceSpec(resources={"place": 1})),
        rewards=RewardsSpec(place=HEAD),
        learner=RanksSpec(place=HEAD),
        limits=LimitsSpec(poll_s=0.5, max_restarts=0, **limits),
    )


@contextmanager
def several(nodes: int) -> Iterator[tuple[Cluster, list[Any]]]:
    """A cluster, and its nodes beside the head, each with room for two generators."""
    head = {"num_cpus": 1, "include_dashboard": False, "labels": HEAD.labels}
    cluster = Cluster(initialize_head=True, connect=False, head_node_args=head, shutdown_at_exit=False)  # from any thread
    with forkserver(WORKER_MODULES) as executable:
        try:
            own = {"runtime_env": {"py_executable": executable}}
            ray.init(address=cluster.address, log_to_driver=False, logging_level="error", **own)
            yield cluster, [add_node(cluster) for _ in range(nodes)]
        finally:
            ray.shutdown()
            cluster.shutdown()


def add_node(cluster: Cluster) -> Any:
    return cluster.add_node(num_cpus=1, resources={"place": 2})


class Led:
    """A run under way. `run` is how it stands, `pids` those of the generators that are up."""

    def __init__(self, recipe: Recipe, deployed: Deployment, runs_dir: Path, name: str) -> None:
        self.run = RunSummary(name=name, total_steps=0)
        self.max_lag = recipe.staleness.max_lag
        self.per_update = recipe.learner.batch_groups * recipe.sampling.n
        self.trainer = Trainer(recipe, deployed, name=name, runs_dir=runs_dir, observe=self._see, progress=False)
        self.result: RunResult | None = None

    def _see(self, run: RunSummary) -> None:
        self.run = run

    @property
    def pids(self) -> list[int]:
        return [pid for name, pid in self.run.pids.items() if name.startswith("generator")]

    def until(self, holds: Callable[[], bool], within_s: float = 120.0) -> None:
        deadline = time.monotonic() + within_s
        while not holds():
            assert time.monotonic() < deadline, "it has not come to that in time"
            self.trainer.fit(1)

    def measure(self, seconds: float) -> float:
        """Samples a second that are trained."""
        began, before = time.monotonic(), self.run.committed
        while (took := time.monotonic() - began) < seconds:
            self.trainer.fit(1)
        return (self.run.committed - before) * self.per_update / took

    def end(self) -> list[str]:
        """Finishes, and returns what is wrong with the log."""
        with self.trainer as trainer:
            self.result = result = trainer.finish()
        said = asdict(result) | {"lag": result.max_trained_lag}
        said["settled"] = result.trained + result.filtered + result.evicted + result.failed + result.unused
        return check(Path(result.run_dir), said, self.max_lag)

    def tokens(self) -> tuple[int, int, int]:
        """Made, and of answers whose generator was lost: sampled again (at the most), gone on from."""
        assert self.result is not None
        rows = open_replay(self.result.run_dir).rollouts(["response_ids"])
        gauges = self.run.reports["store"].gauges
        lost, resumed = (int(gauges[f"handover/{what}_tokens"]) for what in ("lost", "resumed"))
        return pc.sum(pc.list_value_length(rows["response_ids"])).as_py() + lost, lost, resumed


def say(rows: Sequence[tuple[str, Any]]) -> None:
    for name, value in rows:
        print(f"{name:44} {value}", flush=True)
    sys.stdout.flush()
