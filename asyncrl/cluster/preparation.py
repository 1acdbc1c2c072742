"""What the driver makes of a run directory before any actor starts: data, prompts, and the specs as they are run."""

import hashlib
import logging
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import yaml
from msgspec.structs import replace

from asyncrl.config import DataSpec, Deployment, EvaluationSpec, Recipe
from asyncrl.config.callables import GIVEN, PYTHON, RECIPE_MODULE, UNSAVED, SavedFunction, describe, load_callable
from asyncrl.config.paths import rename_functions
from asyncrl.errors import ConfigError
from asyncrl.models.tokenizing import tokenize_only
from asyncrl.rundir import RunDir, redact, write_atomic

log = logging.getLogger(__name__)


def prepare_run(
    recipe: Recipe, deployment: Deployment, paths: RunDir, *, resuming: bool, aside: bool = False
) -> tuple[int, ...]:
    """Makes data and prompts, then the run directory; an earlier run moves aside only when the new one can start.

    Returns the tokens that end a response. resuming: goes on in the directory as it is; raises ConfigError or DataError if
    its groups would be finished with other prompts than they began with. aside: in a process that does nothing else.
    """
    if resuming:
        require_same_groups(paths, recipe)
    if recipe.prepare:
        log.info("preparing what is not there yet: %s", recipe.prepare)
        load_callable(recipe.prepare, "prepare")(recipe, paths.path)
    if aside:
        tokenize_only(recipe.model)
    stop_token_ids = _prepare_prompts(recipe, paths, resuming)
    if not resuming:
        _set_aside(paths)
        paths.create()
    as_run = replace(recipe, algorithm=recipe.algorithm.resolved)
    write_atomic(paths.recipe, msgspec.json.format(msgspec.json.encode(redact(as_run)), indent=2))
    write_atomic(paths.deployment, yaml.safe_dump(redact(deployment), sort_keys=False))
    return stop_token_ids


def save_functions(recipe: Recipe, paths: RunDir) -> Recipe:
    """Writes functions that were given themselves into the run directory, by value and for this user's eyes, and names their
    files in their place: actors find them there, and so does whoever resumes or evaluates the run.

    Raises ConfigError for what can't be pickled.
    """

    def saved(reference: str) -> str:
        if not reference.startswith(UNSAVED) or reference not in GIVEN:
            return reference
        program, name = getattr(_program(), "__file__", None), reference.rpartition(":")[2]
        folder = Path(program).absolute().parent if program else Path.cwd()
        try:
            pickled = _by_value(GIVEN[reference])
        except Exception as error:
            raise ConfigError(
                f"the function {name!r} can't be sent to other processes: {describe(error)}; make in it what it uses, or name "
                "one in a file: path/to/file.py:name"
            ) from error
        content = msgspec.msgpack.encode(SavedFunction(PYTHON, str(folder), pickled))
        path = paths.functions / f"{name}-{hashlib.blake2b(content, digest_size=6).hexdigest()}.pkl"
        write_atomic(path, content, mode=0o600)
        GIVEN[f"{path}:{name}"] = GIVEN[reference]  # in this process it stays what was given
        return f"{path}:{name}"

    return rename_functions(recipe, saved)


def _program() -> ModuleType:
    """What functions that are given themselves come from: the recipe's file, or else the main program."""
    return sys.modules.get(RECIPE_MODULE) or sys.modules["__main__"]


def _by_value(function: Callable[..., Any]) -> bytes:
    """The function with all that it uses of its program."""
    from ray import cloudpickle  # here, as Ray takes a second to import

    if (program := _program()).__name__ == "__main__":  # which cloudpickle takes along by itself
        return cloudpickle.dumps(function)
    cloudpickle.register_pickle_by_value(program)
    try:
        return cloudpickle.dumps(function)
    finally:
        cloudpickle.unregister_pickle_by_value(program)


def _prepare_prompts(recipe: Recipe, paths: RunDir, resuming: bool) -> tuple[int, ...]:
    """Tokenizes train and held-out prompts into the run directory, once; returns the tokens that end a response.

    resuming: the prompts must be those that the run began with; else DataError.
    """
    from asyncrl.models.tokenizing import load_tokenizer, stop_token_ids
    from asyncrl.prompts.dataset import prepare
    from asyncrl.prompts.encoding import encoder, identity

    tokenizer = load_tokenizer(recipe.model)
    encode, tokenizer_id = encoder(tokenizer), identity(tokenizer)
    made = [prepare(recipe.data, encode, paths.data / "train.arrow", tokenizer_id, must_reuse=resuming)]
    if recipe.evaluation.files:
        held_out = replace(recipe.data, files=recipe.evaluation.files, shuffle=False, epochs=None)
        made.append(prepare(held_out, encode, paths.data / "eval.arrow", tokenizer_id))
    for summary in made:
        level = logging.WARNING if summary.too_long else logging.INFO
        said = "%s: %d prompts; %d left out, longer than data.max_prompt_length=%d"
        log.log(level, said, summary.path.stem, summary.prompts, summary.too_long, recipe.data.max_prompt_length)
    return stop_token_ids(tokenizer, recipe.model)


def require_same_groups(paths: RunDir, recipe: Recipe, forking: bool = False) -> None:
    """Refuses to resume, or fork, with other prompts, order or group size: groups would be finished with strangers."""
    doing, fix = "resuming", "resume with the old value, or start over under another --name"
    if forking:
        doing, fix = "forking", "leave it as it was, or start a new run with `asyncrl run`"
    before = msgspec.json.decode(paths.recipe.read_bytes(), type=Recipe)
    held_out = recipe.evaluation if before.evaluation.files else before.evaluation  # where there was none, some may be added
    for name, old, new in (
        ("seed", before.seed, recipe.seed),
        ("data", *(replace(data, files=_by_name(data)) for data in (before.data, recipe.data))),
        ("sampling.n", before.sampling.n, recipe.sampling.n),
        # A round of evaluation that was under way is finished with the prompts that it began with.
        (
            "evaluation (files, limit, n and also)",
            *((_by_name(e), e.limit, e.n, e.also) for e in (before.evaluation, held_out)),
        ),
        ("a baseline per group (adv_estimator='remax')", before.algorithm.wants_baseline, recipe.algorithm.wants_baseline),
    ):
        if old != new:
            raise ConfigError(
                f"{doing} {paths.path} with {name}={new!r}, but it began with {old!r}: groups in its log would be finished "
                f"with other prompts; {fix}"
            )


def _by_name(data: DataSpec | EvaluationSpec) -> tuple[str, ...]:
    """Its files without their folders, which a Ray job has copies of; what is in them, the prompts' fingerprint tells."""
    return tuple(Path(name).name for name in data.files)


def _set_aside(paths: RunDir) -> None:
    """Moves what an earlier run left into `previous-N`; prepared data stays, as the cache that it is."""
    seen = (paths.metrics, paths.tensorboard, paths.trackers, paths.logs, paths.sentinels)
    earlier = (paths.replay, paths.checkpoints, *seen, paths.exports, paths.rewards)
    used = [path for path in earlier if path.is_file() or (path.is_dir() and any(path.iterdir()))]
    if not used:
        return
    numbers = [int(match[1]) for path in paths.path.iterdir() if (match := re.fullmatch(r"previous-(\d+)", path.name))]
    number = 1 + max(numbers, default=0)
    aside = paths.path / f"previous-{number}"
    aside.mkdir()
    for path in [*used, paths.recipe, paths.deployment, paths.forked, paths.facts]:
        if path.exists():
            shutil.move(path, aside / path.name)
    log.warning("%s held an earlier run, which is now in %s; --resume would have gone on with it", paths.path, aside)
