"""The shipped recipes, run for real: what the README promises, in a shorter form."""

import re
import shutil
import threading
import time
import urllib.request
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from asyncrl import RunResult, launch
from asyncrl.cli import main
from asyncrl.config.callables import load_callable
from asyncrl.config.load import load_specs
from asyncrl.config.paths import resolve_paths
from asyncrl.report.names import described
from asyncrl.rundir import RunDir

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("problem", "answer", "careless"),
    [
        ((12, "+", 45), "750", "750"),
        ((17, "+", 5), "220", "210"),  # the carry into the tens is forgotten
        ((99, "+", 99), "891", "880"),
        ((52, "-", 17), "530", "540"),  # tens 5 - 1 = 4 without the borrow, ones (2 - 7) mod 10 = 5
        ((40, "-", 40), "000", "000"),
    ],
)
def test_arithmetic_answers(arithmetic, problem, answer, careless):
    made = arithmetic.Problem(*problem)
    assert (made.answer, made.careless_answer) == (answer, careless)


def test_arithmetic_problems_are_distinct_and_seeded(arithmetic):
    problems = arithmetic._problems(0)
    assert len(set(problems)) == len(problems) == arithmetic.TRAIN + arithmetic.HELD_OUT
    assert problems == arithmetic._problems(0) != arithmetic._problems(1)


def test_arithmetic_reward_is_exact(arithmetic):
    assert [arithmetic.compute_score("addition", text, "750") for text in ("750", "75", "7500", "")] == [1.0, 0.0, 0.0, 0.0]


def test_own_loss_by_hand():
    my_loss = load_callable(f"{ROOT / 'recipes' / 'own_loss.py'}:my_loss")
    logp_t = torch.tensor([1.0, 1.5, 1.5, 1.2, 0.5]).log().requires_grad_()
    advantages_t = torch.tensor([2.0, 1.0, -1.0, 3.0, 0.0])
    loss_t, figures = my_loss(logp_t, torch.zeros(5), advantages_t, torch.zeros(5, dtype=torch.long))
    # |A|/0.4·(r − 1)² − r·A: the penalty is 0.25/0.4 = 0.625 at r = 1.5, and 3·0.04/0.4 = 0.3 at r = 1.2
    torch.testing.assert_close(loss_t.detach(), torch.tensor([-2.0, 0.625 - 1.5, 0.625 + 1.5, 0.3 - 3.6, 0.0]))
    loss_t.sum().backward()
    # r·(|A|/0.2·(r − 1) − A): as policy gradient at r = 1; draws back from 1.5; nothing at r = 1 + ε, where A > 0
    torch.testing.assert_close(logp_t.grad, torch.tensor([-2.0, 2.25, 5.25, 0.0, 0.0]), rtol=0, atol=1e-5)
    assert figures["outside"].tolist()[:3] == [False, True, True]
    assert figures["outside"][4]


@pytest.mark.parametrize("name", ["own_loss", "arithmetic_ppo"])
def test_dry_run_of_recipes_over_arithmetic(name, tmp_path, capsys):
    assert main(["run", str(ROOT / "recipes" / f"{name}.py"), "--runs-dir", str(tmp_path), "--dry-run"]) == 0
    assert name in capsys.readouterr().out
    recipe, _ = load_specs(ROOT / "recipes" / f"{name}.py", None, [])
    resolved = resolve_paths(recipe, RunDir(tmp_path / name), ROOT / "recipes")
    if name == "own_loss":
        assert resolved.algorithm.policy_loss == f"{ROOT / 'recipes' / 'own_loss.py'}:my_loss"
    assert resolved.prepare == f"{ROOT / 'recipes' / 'arithmetic.py'}:prepare"


def run_recipe(name: str, runs_dir: Path, *overrides: str) -> RunResult:
    recipe, deployment = load_specs(ROOT / "recipes" / f"{name}.py", None, overrides)
    return launch(resolve_paths(recipe, RunDir(runs_dir / name), ROOT / "recipes"), deployment, runs_dir=runs_dir)


class Scraper(threading.Thread):
    """Reads Ray's endpoint, which forgets after some seconds, until it is told to end. served: the newest lines of each metric,
    by its name."""

    def __init__(self) -> None:
        import ray

        super().__init__(daemon=True)
        [node] = ray.nodes()
        self._url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        self.served: dict[str, list[str]] = {}
        self.enough = threading.Event()

    def run(self) -> None:
        while not self.enough.wait(1.0):
            with urllib.request.urlopen(self._url, timeout=60) as answer:
                lines = [line for line in answer.read().decode().splitlines() if 'run="arithmetic"' in line]
            self.served |= {name: [*of] for name, of in groupby(sorted(lines), lambda line: line.partition("{")[0])}


@pytest.fixture(scope="module")
def scraper(local_ray) -> Iterator[Scraper]:
    made = Scraper()
    made.start()
    yield made
    made.enough.set()
    made.join()


@pytest.fixture(scope="module")
def arithmetic_run(local_ray, arithmetic_data, scraper, tmp_path_factory) -> RunResult:
    """One seed, 20 of the 200 updates, from a warm policy that is there already."""
    runs = tmp_path_factory.mktemp("runs")
    shutil.copytree(arithmetic_data, runs / "arithmetic" / "data")
    return run_recipe(
        "arithmetic", runs, "total_steps=20", "learner.warmup_steps=6", "evaluation.freq=10", "evaluation.limit=256"
    )


@pytest.fixture(scope="module")
def ppo_run(local_ray, arithmetic_data, tmp_path_factory) -> RunResult:
    """The beginning of the recipe, from the same warm policy; the critic, a rank of its own, learns alone for two updates."""
    runs = tmp_path_factory.mktemp("runs")
    shutil.copytree(arithmetic_data, runs / "arithmetic_ppo" / "data")
    overrides = [
        "total_steps=14",
        "critic.critic_warmup=2",
        "learner.warmup_steps=4",
        "deploy.critic.ranks=1",
        "evaluation.limit=256",
    ]
    return run_recipe("arithmetic_ppo", runs, *overrides, "checkpoint.save_freq=2", "checkpoint.keep_last_n=20")


@pytest.mark.ray
def test_arithmetic_learns(arithmetic_run, arithmetic_data, metrics_of):
    """Held-out exact match from at most 0.5 to at least 0.7."""
    result = arithmetic_run
    assert result.steps == 20
    assert result.first_score is not None
    assert result.first_score <= 0.5
    assert result.last_score is not None
    assert result.last_score >= 0.7
    assert result.max_trained_lag <= 4
    assert result.restarts == {}
    assert result.samples == result.trained * 8
    run = Path(result.run_dir)
    assert pq.read_schema(run / "data" / "train.parquet").names == [
        "data_source",
        "prompt",
        "ability",
        "reward_model",
        "extra_info",
    ]
    assert [line["step"] for line in metrics_of(run, "step")] == list(range(1, 21))
    evaluated = [line["step"] for line in metrics_of(run, "eval")]
    assert (evaluated[0], evaluated[-1], len(evaluated)) == (0, 20, 3)
    # a generator that never held the very version asked for is evaluated at the next one it takes
    assert all(0 <= step - due <= 4 for step, due in zip(evaluated, [0, 10, 20], strict=True))
    made, found = (folder / "warm" / "made.json" for folder in (arithmetic_data, run / "data"))
    assert found.stat().st_mtime_ns == made.stat().st_mtime_ns, "the warm-up was done again"


@pytest.mark.ray
def test_arithmetic_ppo_learns(arithmetic_run, ppo_run, metrics_of):
    """The critic learns returns, and the policy improves."""
    assert ppo_run.first_score == pytest.approx(arithmetic_run.first_score, abs=0.01)  # batched differently
    assert ppo_run.last_score >= ppo_run.first_score + 0.15
    steps = metrics_of(ppo_run.run_dir, "step")
    assert [line["actor/optimizer_steps"] for line in steps] == [0.0] * 2 + [4.0] * 12
    assert {line["critic/optimizer_steps"] for line in steps} == {4.0}
    assert steps[0]["critic/vf_loss"] > steps[-1]["critic/vf_loss"]


@pytest.mark.ray
def test_a_critic_learns_alone_first_and_is_in_every_checkpoint(ppo_run, metrics_of):
    run = RunDir(ppo_run.run_dir)
    steps = metrics_of(run.path, "step")
    assert steps[0]["critic/values_mean"] == 0.0 != steps[1]["critic/values_mean"]
    assert "actor/reward_kl_penalty" in steps[3]
    start, warm, end = (load_file(run.checkpoint(update) / "policy" / "model.safetensors") for update in (0, 2, 14))
    assert all(tensor.equal(warm[name]) for name, tensor in start.items())
    assert any(not tensor.equal(end[name]) for name, tensor in start.items())
    heads = [load_file(run.checkpoint(update) / "critic" / "model.safetensors") for update in (0, 2, 14)]
    assert heads[0]["lm_head.weight"].abs().max() == 0.0
    assert not heads[1]["lm_head.weight"].equal(heads[2]["lm_head.weight"])


HEAD = {"sequence", "time", "kind", "step", "incarnation"}  # of a line


@pytest.mark.ray
def test_every_figure_is_documented_and_says_what_it_should(arithmetic_run, ppo_run, metrics_of):
    for run in (arithmetic_run, ppo_run):
        rows = {name: described(name) for line in metrics_of(run.run_dir) for name in line if name not in HEAD}
        assert [name for name, known in rows.items() if known is None] == []
        assert [name for name, known in rows.items() if known and known.row.name in ("reward/<part>", "actor/<figure>")] == []
    for line in metrics_of(arithmetic_run.run_dir, "step"):
        both = [line[f"samples/{source}"] for source in ("addition", "subtraction")]
        assert sum(both) == line["samples"]
        means = [line[f"reward/mean/{source}"] for source in ("addition", "subtraction")]
        weighted = sum(count * mean for count, mean in zip(both, means, strict=True)) / line["samples"]
        assert weighted == pytest.approx(line["reward/mean"]) == pytest.approx(line["critic/score/mean"])
        assert line["critic/advantages/mean"] == pytest.approx(0.0, abs=0.02)  # over tokens: answers are not all as long
        assert line["actor/ratio/mean"] == line["actor/ratio/max"] == 1.0  # a single step, from the proximal policy itself
        assert 0 <= line["timing_s/unaccounted"] < 0.5 * line["perf/time_per_step"]
    moved = [line for line in metrics_of(ppo_run.run_dir, "step") if line["actor/optimizer_steps"]]
    assert all(line["actor/ratio/max"] > 1.0 and line["actor/ppo_kl_k3"] > 0.0 for line in moved)
    parts = [line["clip_ratio/low_mean"] + line["clip_ratio/high_mean"] for line in moved]
    assert parts == pytest.approx([line["actor/pg_clipfrac"] for line in moved])


# what a run of GRPO without episodes, on CPUs, has none of
NOT_HERE = {"perf_mfu_actor", "perf_max_memory_allocated_gb", "perf_max_memory_reserved_gb"}
NOT_HERE |= {"num_turns_mean", "tools_call_frequency", "tools_failure_frequency"}


@pytest.mark.ray
def test_rays_endpoint_serves_what_the_dashboard_asks_for(arithmetic_run, scraper):
    """The run joined a Ray that was there, as it joins a cluster."""
    asked = set(re.findall(r"ray_asyncrl_\w+", (ROOT / "deploy" / "grafana" / "asyncrl.json").read_text()))
    asked -= {f"ray_asyncrl_{name}" for name in NOT_HERE}
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and not asked <= scraper.served.keys():  # a process tells the node's agent every 10 s
        time.sleep(0.2)
    assert asked - scraper.served.keys() == set()

    def value(line: str) -> float:
        return float(line.rpartition(" ")[2])

    assert 1 <= value(scraper.served["ray_asyncrl_update"][0]) <= 20
    by_state = [line for line in scraper.served["ray_asyncrl_actors_by_state"] if 'actor="learner"' in line]
    assert sum(map(value, by_state)) == pytest.approx(1.0)
    events = [path.name for path in RunDir(arithmetic_run.run_dir).tensorboard.iterdir()]
    assert len(events) == 1
