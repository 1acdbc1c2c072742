"""Weights & Biases (extra `[wandb]`): a run there for a run here, also when it is resumed.

As W&B has it, the environment says where: WANDB_PROJECT (by itself `asyncrl`), WANDB_ENTITY, WANDB_MODE=offline, WANDB_API_KEY.
"""

import os
import uuid
from collections.abc import Mapping
from typing import Any

from asyncrl.errors import ConfigError
from asyncrl.report.trackers import RunFacts
from asyncrl.rundir import RunDir, write_atomic


class WandB:
    """Sends figures, recipe and deployment; no code, no output of the terminal, nothing of the machine or its environment."""

    def start(self, facts: RunFacts) -> None:
        import wandb

        if os.environ.get("WANDB_MODE") not in ("offline", "disabled", "dryrun") and not wandb.login(prompt=False):
            raise ConfigError("W&B has no key here: run `wandb login`, or set WANDB_API_KEY, or WANDB_MODE=offline")
        mark = RunDir(facts.run_dir).trackers / "wandb.id"  # the id of its run there
        identity = mark.read_text() if mark.is_file() else uuid.uuid4().hex[:8]
        write_atomic(mark, identity)
        settings = wandb.Settings(
            console="off", save_code=False, disable_code=True, disable_git=True, x_disable_meta=True, x_save_requirements=False
        )
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "asyncrl",
            name=facts.name,
            id=identity,
            resume="allow",
            dir=str(mark.parent),
            config={"recipe": facts.recipe, "deployment": facts.deployment},
            settings=settings,
        )
        # Its own steps may only rise: an evaluation, which comes after newer updates, would be dropped.
        self._run.define_metric("update")
        self._run.define_metric("*", step_metric="update")

    def log(self, metrics: Mapping[str, float], step: int, time: float) -> None:
        self._run.log({**metrics, "update": step})

    def close(self) -> None:
        self._run.finish()
