"""What a run will write into its directory, against what is free there; found out without torch."""

import logging
import math
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from asyncrl.config import Deployment, ModelSpec, Recipe
from asyncrl.disk import as_size, free_bytes
from asyncrl.errors import ConfigError
from asyncrl.rundir import RunDir

log = logging.getLogger(__name__)
_ADAM = 3  # the weights and their two moments
_ROLLOUT_BYTES = 1024  # of a rollout's row and events, besides its tokens
_PROMPT_TOKEN_BYTES, _RESPONSE_TOKEN_BYTES = 4 + 5, 4 + 5 + 4 + 1  # id and spelling; of a response also logprob and mask


def check_space(recipe: Recipe, deployment: Deployment, run_dir: RunDir, free: Callable[[Path], int] = free_bytes) -> str:
    """One sentence of the plan. Raises ConfigError where not even one checkpoint and one segment of the log have room; warns
    where all that the run is to keep may not. Of a model that is not on this machine yet only the log is known.
    """
    models = [recipe.model] if recipe.learner.lora is None else []  # adapters are small
    if recipe.algorithm.needs_critic and recipe.critic.backbone == "own":
        models.append(recipe.critic.model or recipe.model)
    checkpoint = sum(_checkpoint_bytes(model) for model in models)
    spec, store = recipe.checkpoint, deployment.store
    kept = max(store.keep_bytes, spec.save_freq * (spec.keep_last_n + 1) * update_bytes(recipe))  # what a resume needs stays
    log_bytes = min(recipe.total_steps * update_bytes(recipe), kept + store.segment_bytes)
    for_ever = recipe.total_steps // spec.keep_every if spec.keep_every else 0
    more = max(1, spec.keep_last_n + 1 + for_ever - len(run_dir.steps()))  # the next is written before the oldest goes
    needed, least, have = more * checkpoint + log_bytes, checkpoint + deployment.store.segment_bytes, free(run_dir.path)
    parts = f"{more} checkpoints of {as_size(checkpoint)}" if checkpoint else "checkpoints of a size not known yet"
    if have < least:
        raise ConfigError(
            f"{as_size(have)} are free for {run_dir.path} < {as_size(least)}, which one checkpoint ({as_size(checkpoint)}) "
            f"and one segment of the log (store.segment_bytes={deployment.store.segment_bytes}) take: the run could not go on "
            "for long; make room (`asyncrl clean` lists what dead runs left), or put --runs-dir on another disk"
        )
    plan = f"{as_size(have)} free; {parts}, and up to {as_size(log_bytes)} of log if every response is as long as it may be"
    if have < needed:
        log.warning("the disk of %s may fill before the run ends: %s", run_dir.path, plan)
    return plan


def _checkpoint_bytes(model: ModelSpec) -> int:
    """Of a model that is trained; 0 if its weights are not safetensors in a folder here."""
    parameters = 0
    for file in Path(model.path).glob("*.safetensors"):
        try:
            with safe_open(file, framework="numpy") as tensors:
                parameters += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
        except SafetensorError as error:
            raise ConfigError(
                f"{file} is no readable safetensors file ({error}): no model could be loaded; get it again"
            ) from error
    return _ADAM * parameters * (4 if model.dtype == "float32" else 2)


def update_bytes(recipe: Recipe) -> int:
    """What an update of the longest prompts and responses leaves in the log; compressed it takes less."""
    prompt, response = recipe.data.max_prompt_length, recipe.sampling.max_response_length
    rollout = _ROLLOUT_BYTES + prompt * _PROMPT_TOKEN_BYTES + response * _RESPONSE_TOKEN_BYTES
    return recipe.learner.batch_groups * recipe.rollouts_per_group * rollout
