"""Everything about a run that can be known to fail before an actor starts; `--dry-run` prints the plan and ends here.

No torch, no Ray: well under two seconds. All problems are reported at once, not one per attempt.
"""

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from asyncrl.cluster.fit import device_memory, fit_layouts
from asyncrl.cluster.resources import check_placement, named_cluster
from asyncrl.cluster.serving import check_asked
from asyncrl.cluster.space import check_space, update_bytes
from asyncrl.config import ESTIMATOR_NAMES, LOSS_NAMES, SETTINGS, UNGROUPED, Deployment, LoraSpec, ModelSpec, Recipe, run_dtypes
from asyncrl.config.callables import check_callable
from asyncrl.disk import as_size, existing
from asyncrl.errors import ConfigError, DataError
from asyncrl.generate.engines import engine_kind
from asyncrl.learn.policies import newest_complete, require_resumable
from asyncrl.models.architectures import differing_shapes, named, not_causal, read_config
from asyncrl.models.hub import require_model
from asyncrl.models.sizes import size_of
from asyncrl.prompts.reading import check_columns, read_rows
from asyncrl.replay.log.recent import COLUMNS
from asyncrl.report.sentry import check_sentinels
from asyncrl.report.trackers import check_tracker
from asyncrl.rundir import RunDir

Check = Callable[[], str]  # a line of the plan; raises ConfigError or DataError


def check_run(recipe: Recipe, deployment: Deployment, run_dir: RunDir) -> list[str]:
    """The plan of a run as lines of text. Raises ConfigError or DataError naming every problem found.

    recipe: after `paths.resolve_paths`. Files inside the run directory are taken to be made by `recipe.prepare`, if it
    has one. The staleness constraints and divisibility were checked when the recipe was made (asyncrl.config).
    """
    plan: list[str] = []
    problems: list[ConfigError | DataError] = []
    for label, look in _checks(recipe, deployment, run_dir):
        try:
            plan.append(f"{label:<11} {look()}")
        except (ConfigError, DataError) as problem:
            problems.append(problem)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        listing = "\n".join(f"  {number}. {problem}" for number, problem in enumerate(problems, start=1))
        raise ConfigError(f"{len(problems)} problems:\n{listing}")
    return plan


def check_resumed(recipe: Recipe, run_dir: RunDir, at: int | None = None) -> None:
    """Looks at the checkpoint that a run is to go on from: that of update `at`, or the newest whose files are all there. What
    is in them is compared with their sums where they are loaded.

    Raises ConfigError if there is none, or it is of another model; CheckpointError if files, or parts of tensors, are missing.
    """
    folder, _ = newest_complete(run_dir, at, sums=False)
    require_resumable(folder, *(["critic"] if recipe.algorithm.needs_critic else []))
    if differing := differing_shapes(read_config(recipe.model.path), read_config(str(folder / "policy"))):
        raise ConfigError(
            f"model.path={recipe.model.path!r} has {', '.join(differing)} as in {folder}: its weights fit nowhere; go on "
            "with the run's own model, or start a new run of another name"
        )


def _checks(recipe: Recipe, deployment: Deployment, run_dir: RunDir) -> Iterator[tuple[str, Check]]:
    """What each line of the plan is about, and how it is found out."""
    yield "run", lambda: _run_dir(run_dir)
    yield "model", lambda: _policy(recipe, deployment, run_dir)
    if critic := recipe.critic.model:
        yield "critic.model", lambda: _causal("critic.model", critic, recipe, run_dir)[0]
    if lora := recipe.learner.lora:
        yield "lora", lambda: _lora(lora, recipe.model)
    for label, files in (("data", recipe.data.files), ("evaluation", recipe.evaluation.files)):
        for file in files:
            yield label, partial(_data_file, file, recipe, run_dir)
    yield "reward", lambda: _callables(recipe)
    for term in recipe.reward.terms():
        if not term.function:
            model = partial(_model, "reward model", recipe=recipe, run_dir=run_dir)
            yield "reward", partial(check_asked, term, recipe, deployment, model)
    yield "algorithm", lambda: _algorithm(recipe)
    yield "sampling", lambda: _sampling(recipe)
    yield "episode", lambda: _episode(recipe)
    yield "lengths", lambda: _lengths(recipe, deployment)
    yield "batches", lambda: _batches(recipe, deployment, run_dir)
    yield "staleness", lambda: _staleness(recipe, deployment)
    yield "history", lambda: _history(recipe, deployment)
    yield "dtypes", lambda: _dtypes(recipe, deployment)
    yield "engine", lambda: engine_kind(deployment.generators.engine.kind).check(deployment)
    yield "placement", lambda: check_placement(deployment, served=len(recipe.reward.served))
    yield "learner", lambda: _learner(recipe, deployment)
    if recipe.sentinels:
        yield "sentinels", lambda: check_sentinels(recipe, COLUMNS)
    yield "trackers", lambda: _trackers(deployment)
    yield "disk", lambda: check_space(recipe, deployment, run_dir)


def _trackers(deployment: Deployment) -> str:
    for name in deployment.trackers:
        check_tracker(name)
    return ", ".join(deployment.trackers) or "none"


def _run_dir(run_dir: RunDir) -> str:
    for folder in (existing(run_dir.path), *run_dir.path.glob("*/")):
        try:
            tempfile.TemporaryFile(dir=folder).close()  # permissions alone don't tell: of root, or of a read-only file system
        except OSError as error:
            raise ConfigError(
                f"run directory {run_dir.path}: {folder} is not a writable folder ({error.strerror}): nothing could be "
                "saved; choose another with --runs-dir"
            ) from error
    return str(run_dir.path)


def _made(path: str, recipe: Recipe, run_dir: RunDir) -> bool:
    return bool(recipe.prepare) and Path(path).is_relative_to(run_dir.path)


def _model(field: str, model: ModelSpec, recipe: Recipe, run_dir: RunDir) -> str:
    if _made(model.path, recipe, run_dir):
        return f"{model.path} (made by prepare)"
    if model.tokenizer and not _made(model.tokenizer, recipe, run_dir):
        files = ("tokenizer_config.json", "tokenizer.json", "config.json")
        require_model(model.tokenizer, f"{field}.tokenizer", *files, revision=model.tokenizer_revision)
    return require_model(model.path, f"{field}.path", revision=model.revision)


def _causal(field: str, model: ModelSpec, recipe: Recipe, run_dir: RunDir) -> tuple[str, dict[str, Any]]:
    """The line of a model, and its config.json as far as it is known."""
    line, config = _model(field, model, recipe, run_dir), read_config(model.path, model.revision)
    if model.builder:
        check_callable(model.builder, f"{field}.builder")
        return f"{line}, made by {model.builder}", config
    config |= model.override_config
    if problem := not_causal(config):
        raise ConfigError(f"{field}.path={model.path!r} is no causal language model: {problem}; name one that is")
    return line, config


def _policy(recipe: Recipe, deployment: Deployment, run_dir: RunDir) -> str:
    line, config = _causal("model", recipe.model, recipe, run_dir)
    kind = deployment.generators.engine.kind
    if problem := engine_kind(kind).not_served(recipe.model, config):
        raise ConfigError(
            f"model.path={recipe.model.path!r} ({named(config)}) can't be served by generators.engine.kind={kind!r}: {problem}"
        )
    return line


def _lora(spec: LoraSpec, model: ModelSpec) -> str:
    if find_spec("peft") is None:
        raise ConfigError(
            "learner.lora needs peft, which is not installed: pip install 'asyncrl[lora]', or train the whole model"
        )
    size, targets = size_of(read_config(model.path)), ", ".join(spec.target_modules)
    share = f": about {spec.rank * size.widths:,} parameters, beside {size.parameters:,} that stay" if size else ""
    return f"adapters of rank {spec.rank}, alpha {spec.alpha:g}, of {targets}{share if targets == 'all-linear' else ''}"


def _data_file(file: str, recipe: Recipe, run_dir: RunDir) -> str:
    if _made(file, recipe, run_dir):
        return f"{file} (made by prepare)"
    check_columns([file], recipe.data)
    return f"{file}: {recipe.data.prompt_key}, {recipe.data.answer_key}, {recipe.data.source_key} found"


def _callables(recipe: Recipe) -> str:
    terms = recipe.reward.terms()
    for term in terms:
        if term.function:
            check_callable(term.function, "reward.function")
    for field, name, built_in in (
        ("sampling.keep", recipe.sampling.keep, ("all", "varied")),
        *((f"episode.{field}", name, ()) for field, name in recipe.episode.found_here),
        ("algorithm.adv_estimator", recipe.algorithm.adv_estimator, ESTIMATOR_NAMES),
        ("algorithm.policy_loss", recipe.algorithm.policy_loss, LOSS_NAMES),
        ("prepare", recipe.prepare, ("",)),
        *(("evaluation.metrics", metric, ()) for metric in recipe.evaluation.metrics),
    ):
        if name not in built_in:
            check_callable(name, field)
    return f"{', '.join(term.what for term in terms)}, at most {recipe.reward.deadline_s:g} s a sample"


def _episode(recipe: Recipe) -> str:
    spec = recipe.episode
    if not spec.what:
        return "none: a rollout is one answer"
    if spec.agent and not find_spec("aiohttp"):
        raise ConfigError(
            f"episode.agent={spec.agent!r} reaches the policy by HTTP, which needs aiohttp: pip install 'asyncrl[agents]'"
        )
    if spec.chat and not find_spec("renderers"):
        raise ConfigError(
            f"episode.chat={spec.chat!r} needs renderers, which is not installed: pip install 'asyncrl[agents]', or leave it "
            "empty, for the tokenizer's own chat template"
        )
    longest = f"{spec.deadline_s:g} s, and {spec.step_deadline_s:g} s for an answer of its own"
    return f"{spec.what}, at most {spec.max_turns} turns in {longest}"


def _algorithm(recipe: Recipe) -> str:
    """The choices that are made, each with the settings that it reads; those left to the loss as what they come to."""
    spec, told = recipe.algorithm, []
    choices = [name for name in SETTINGS if name != "kl_control"]
    if spec.learns_preferences:
        choices = ["policy_loss", "loss_agg"] if spec.kl_coef or spec.entropy_coef else ["policy_loss"]
    choices += ["kl_coef", "kl_in", "kl_estimator", "kl_control"] if spec.kl_coef else []
    for choice in choices:
        chosen = spec.setting(choice)
        for name in chosen if isinstance(chosen, tuple) else (chosen,):
            fields = SETTINGS.get(choice, {}).get(name, "").split()
            settings = ", ".join(f"{field}={value}" for field in fields if (value := spec.setting(field)) is not None)
            told.append(f"{choice}={name}" + (f" ({settings})" if settings else ""))
    return "; ".join(told)


def _sampling(recipe: Recipe) -> str:
    """What is sampled with; and what the model's folder recommends, where that differs: the recipe alone decides."""
    spec = recipe.sampling
    said = f"n={spec.n}, temperature={spec.temperature:g}, top_p={spec.top_p:g}, top_k={spec.top_k}"
    recommended = read_config(recipe.model.path, recipe.model.revision, "generation_config.json")
    names = [name for name in ("temperature", "top_p", "top_k") if recommended.get(name, own := getattr(spec, name)) != own]
    if not names:
        return said
    others = ", ".join(f"{name}={recommended[name]:g}" for name in names)
    return f"{said}; generation_config.json of the model says {others}, which is not used: a recipe says what is trained on"


def _lengths(recipe: Recipe, deployment: Deployment) -> str:
    prompt, response = recipe.data.max_prompt_length, recipe.sampling.max_response_length
    bound = deployment.generators.engine.max_length
    if prompt + response > bound:
        raise ConfigError(
            f"data.max_prompt_length={prompt} + sampling.max_response_length={response} = {prompt + response} tokens > "
            f"generators.engine.max_length={bound}: the longest rollouts would not fit; lower the former, or set "
            f"deploy.generators.engine.max_length={prompt + response}"
        )
    return f"{prompt} prompt + {response} response tokens of {bound}"


def _batches(recipe: Recipe, deployment: Deployment, run_dir: RunDir) -> str:
    n, batch = recipe.sampling.n, recipe.learner.batch_groups
    if n == 1 and recipe.algorithm.adv_estimator in ESTIMATOR_NAMES and recipe.algorithm.adv_estimator not in UNGROUPED:
        raise ConfigError(
            f"sampling.n=1 with algorithm.adv_estimator={recipe.algorithm.adv_estimator!r}: an advantage is a reward against "
            "its own group's mean, so all would be 0 and nothing learned; use sampling.n >= 2"
        )
    size, added = recipe.rollouts_per_group, " + 1 for its baseline" if recipe.algorithm.wants_baseline else ""
    if (slots := deployment.generators.engine.slots) < size:
        raise ConfigError(
            f"generators.engine.slots={slots} < sampling.n={n}{added}: a group could never be decoded together; "
            f"set deploy.generators.engine.slots={size} or more"
        )
    if all(Path(file).is_file() and not _made(file, recipe, run_dir) for file in recipe.data.files):
        try:
            rows = sum(1 for _ in islice(read_rows(recipe.data), batch))
        except DataError:
            rows = batch  # the check of the data file tells of it
        if 0 < rows < batch:
            raise ConfigError(
                f"{', '.join(recipe.data.files)}: {rows} rows < learner.batch_groups={batch}: an epoch cannot fill a batch, so "
                f"one prompt would be in a batch twice; add data, or set learner.batch_groups={rows} or less"
            )
    return f"{recipe.total_steps} updates × {batch} groups × {n} rollouts{added}"


def _staleness(recipe: Recipe, deployment: Deployment) -> str:
    """Both numbers, in words: how stale a token may ever be, and how far generation runs ahead."""
    generators = deployment.generators
    rule = recipe.staleness_rule(generators.slots, generators.least)
    ahead = rule.most_outstanding // rule.batch_groups
    chosen = ""
    if recipe.staleness.reserve_ahead == "auto" and rule.on_stale != "wait":
        chosen = f", for {generators.slots} slots"
        if recipe.episode.in_flight:
            chosen += f" or {generators.least} × episode.in_flight={recipe.episode.in_flight}, whichever are more"
    return (
        f"{rule.on_stale if rule.max_lag else 'hold'}: no trained token is ever more than max_lag={rule.max_lag} updates old; "
        f"usually {ahead - 1} or less, as reserve_ahead={ahead} batches ({rule.most_outstanding} groups) are outstanding at "
        f"most{chosen}"
    )


def _dtypes(recipe: Recipe, deployment: Deployment) -> str:
    dtypes = run_dtypes(recipe, deployment)
    gap = "" if dtypes.compute == dtypes.engine == dtypes.bus else "; log-probabilities of engine and learner differ by that"
    return (
        f"the learner keeps weights in {recipe.model.dtype} and computes in {dtypes.compute}; they travel in {dtypes.bus}, and "
        f"the engine computes in {dtypes.engine}{gap}"
    )


def _history(recipe: Recipe, deployment: Deployment) -> str:
    """When rollouts begin to be deleted."""
    bound = deployment.store.keep_bytes
    updates = bound // update_bytes(recipe)
    return (
        f"every rollout, until they take deploy.store.keep_bytes={bound} ({as_size(bound)}), after some {updates:,} "
        "updates of the longest responses; then the oldest are deleted, but for what a resume needs"
    )


def _learner(recipe: Recipe, deployment: Deployment) -> str:
    """How its ranks will divide its models, why, and what of that they will take."""
    groups, here = deployment.groups, not named_cluster(deployment)
    devices = {group: [device_memory(of.place)] * of.ranks for group, of in groups.items()} if here else None
    lines: list[str] = []
    for group, fit in fit_layouts(recipe, deployment, devices).items():
        lines += [f"{group}: {fit.reason}" if len(groups) > 1 else fit.reason, *fit.table]
    return f"\n{'':<12}".join(lines)
