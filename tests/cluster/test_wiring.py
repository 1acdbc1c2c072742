"""From specs to stages: what of two specs comes together in one of them."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from asyncrl.cluster import wiring
from asyncrl.cluster.plan import RunPlan
from asyncrl.config import Deployment, EpisodeSpec, EvaluationSpec, LearnerSpec, PrecisionSpec
from asyncrl.types import Prompt


def test_weights_travel_and_are_served_in_what_the_learner_computes_in(
    tmp_path: Path, tiny_recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites: list[Any] = []

    class Kind:
        def build(self, site: Any) -> Any:
            sites.append(site)
            raise InterruptedError("an engine is not wanted")

    monkeypatch.setattr("asyncrl.generate.engines.engine_kind", lambda name: Kind())
    recipe = tiny_recipe(learner=LearnerSpec(precision=PrecisionSpec(compute="bfloat16")))
    plan = RunPlan(recipe=recipe, deployment=Deployment(), run_dir=str(tmp_path), started=1, loopback=True)
    with pytest.raises(InterruptedError):
        wiring.build("generator", "generator-0", 0, plan, None)
    assert sites[0].model == replace(recipe.model, dtype="bfloat16")


@pytest.mark.parametrize("episode", [EpisodeSpec(), EpisodeSpec(tools=("tools.py:multiply",))])
def test_evaluations_are_pinned_but_for_episodes(
    tmp_path: Path, tiny_recipe: Any, monkeypatch: pytest.MonkeyPatch, episode: EpisodeSpec
) -> None:
    monkeypatch.setattr("asyncrl.prompts.dataset.PromptFile", lambda path: [Prompt(row=0, ids=(1,), data_source="test")] * 99)
    monkeypatch.setattr("asyncrl.replay.store.ReplayStore", lambda plan, *rest: plan)
    recipe = tiny_recipe(episode=episode, evaluation=EvaluationSpec(files=("held_out.jsonl",)))
    made: Any = wiring.build_store(
        RunPlan(recipe=recipe, deployment=Deployment(), run_dir=str(tmp_path), started=1, loopback=True)
    )
    assert made.evaluation.pinned == (episode == EpisodeSpec())


def test_actors_that_compute_nothing_import_no_torch():
    """All that `build_store` and the builder of reward workers import. (Where a forkserver is, they share its torch.)"""
    needed = [f"asyncrl.{part}" for part in ("prompts.dataset", "replay.client", "replay.plan", "replay.store")]
    needed += [f"asyncrl.reward.{part}" for part in ("pool", "shaping", "worker")]
    program = f"import sys, {', '.join(needed)}, asyncrl.cluster.actors\nprint('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "False\n"
