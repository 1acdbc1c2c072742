"""From specs to the models that rewards ask: what serves one, what asks it, and what the run directory says of it. No Ray."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from msgspec.structs import replace

from asyncrl.cluster.resources import named_cluster
from asyncrl.config import (
    CPU_PACK_TOKENS,
    Deployment,
    GeneratorsSpec,
    JudgeSpec,
    LimitsSpec,
    ModelSpec,
    ModelsSpec,
    Recipe,
    RewardSpec,
    RewardTerm,
)
from asyncrl.config.callables import check_callable
from asyncrl.errors import ConfigError
from asyncrl.generate.engines import EngineSite, engine_kind
from asyncrl.models.architectures import not_a_classifier, read_config
from asyncrl.models.hub import frozen_folder
from asyncrl.reward.opinions import api_key, read_prompt
from asyncrl.reward.served import Classifier, Judge, Respond
from asyncrl.rundir import redact, write_atomic
from asyncrl.types import Sampling, Version

log = logging.getLogger(__name__)


class ModelServer(NamedTuple):
    """A model that is up, what looks after it and ends it, and what it is."""

    respond: Respond
    health: Callable[[], None]
    close: Callable[[], None]
    facts: dict[str, str]


def serve_model(
    name: str, term: RewardTerm, spec: ModelsSpec, limits: LimitsSpec, logs: Path, deadline_s: float
) -> ModelServer:
    """Loads the model of a term, downloading it first if need be. deadline_s: for each answer. Raises ConfigError."""
    assert term.served is not None
    from asyncrl.models.loading import use_threads
    from asyncrl.models.tokenizing import load_tokenizer

    use_threads(spec.place.threads)
    folder, digest = frozen_folder(term.served.path, term.served.revision)
    dtype = term.served.dtype if spec.engine.dtype == "auto" else spec.engine.dtype
    model = replace(term.served, path=str(folder), revision="", dtype=dtype)
    generators = GeneratorsSpec(place=spec.place, engine=spec.engine)
    site = EngineSite(generators=generators, model=model, limits=limits, name=name, logs=logs)
    tokenizer = load_tokenizer(model)
    commit = "" if Path(term.served.path).expanduser().is_dir() else folder.name
    facts = {"model": term.served.path, "commit": commit, "weights": digest, "dtype": dtype}
    facts["chat_template"] = _hash(str(tokenizer.chat_template))
    up = _judge(site, term.judge, tokenizer, deadline_s) if term.judge else _classifier(site, spec, tokenizer, deadline_s)
    return ModelServer(*up, facts)


Up = tuple[Respond, Callable[[], None], Callable[[], None]]


def _classifier(site: EngineSite, spec: ModelsSpec, tokenizer: Any, deadline_s: float) -> Up:
    from asyncrl.models.classifier import chat_encoder, load_classifier, logits_of, padding_of

    if problem := not_a_classifier(read_config(site.model.path)):
        raise ConfigError(f"reward model {site.model.path!r} {problem}")
    make = partial(Classifier, chat_encoder(tokenizer), max_length=spec.engine.max_length, deadline_s=deadline_s)
    if spec.engine.kind == "sglang":
        from asyncrl.generate.sglang.classifier import SGLangClassifier

        server = SGLangClassifier(site)
        return make(server, pack_tokens=spec.max_tokens_per_pack), server.health, server.close
    pack_tokens = spec.max_tokens_per_pack if spec.place.gpus else min(spec.max_tokens_per_pack, CPU_PACK_TOKENS)
    model = load_classifier(site.model, "cuda" if spec.place.gpus else "cpu")
    nothing = lambda: None  # noqa: E731
    return make(logits_of(model, padding_of(tokenizer, site.model)), pack_tokens=pack_tokens), nothing, nothing


def _judge(site: EngineSite, judge: JudgeSpec, tokenizer: Any, deadline_s: float) -> Up:
    from asyncrl.models.loading import load_model, named_weights
    from asyncrl.models.tokenizing import stop_token_ids
    from asyncrl.prompts.encoding import encoder

    stops, most = stop_token_ids(tokenizer, site.model), judge.max_tokens
    sampling = Sampling(temperature=judge.temperature, top_p=1.0, top_k=0, max_tokens=most, stop_token_ids=stops)
    engine = engine_kind(site.generators.engine.kind).build(site)
    engine.start()
    engine.update_weights(Version(0, 0), named_weights(load_model(site.model)))
    decode = partial(tokenizer.decode, skip_special_tokens=True)
    respond = Judge(engine, encoder(tokenizer), decode, sampling, deadline_s)
    return respond, lambda: engine.health(site.limits.health_timeout_s), engine.close


# --------------------------------------------------------------------------------------------- what they are


def check_asked(term: RewardTerm, recipe: Recipe, deployment: Deployment, find: Callable[[ModelSpec], str]) -> str:
    """What a dry run says of a reward model or judge. Raises ConfigError for what is known to fail before it is loaded. find:
    proves that a model is there."""
    judge, model, models = term.judge, term.served, deployment.rewards.models
    if judge:
        read_prompt(judge)
        if judge.parse:
            check_callable(judge.parse, "reward.judge.parse")
        if recipe.evaluation.files:
            require_scored_alone(recipe.reward)
        if not named_cluster(deployment):
            api_key(judge)
        if not model:
            key = f"with the key in {judge.key_env}" if judge.key_env else "without a key"
            return f"{term.named}: {judge.url} {key}, asked what {judge.prompt} says"
    assert model is not None
    line = find(model)
    if not judge and (problem := not_a_classifier(read_config(model.path, model.revision))):
        raise ConfigError(f"reward model {model.path!r} {problem}")
    generators = GeneratorsSpec(place=models.place, engine=models.engine)
    engine_kind(models.engine.kind).check(replace(deployment, generators=generators))
    return f"{term.named}: {line}, served by {models.count} × {models.engine.kind}"


def require_scored_alone(reward: RewardSpec) -> None:
    """Raises ConfigError for a reward that an evaluation can't have: one that only compares."""
    if all(term.judge and term.judge.pairwise for term in reward.terms()):
        raise ConfigError(
            f"evaluation.files with nothing but {reward.terms()[0].named}, which compares responses of one policy with each "
            "other: every score would be a half; leave evaluation.files out, or add a term that scores each response (for "
            "asyncrl eval: --reward file.py:name)"
        )


def provenance(term: RewardTerm, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What a reward model or judge is. facts: of the model that is served for it."""
    judge = {"url": term.judge.url, "served_name": term.judge.served_name} if term.judge and term.judge.url else {}
    asked = {"prompt": _hash(read_prompt(term.judge))} if term.judge else {}
    said: dict[str, Any] = redact({**judge, **facts, **asked})
    return said


def tell_changes(folder: Path, term: RewardTerm, said: Mapping[str, Any]) -> Path:
    """Warns where a reward model or judge is not what the run with this folder noted. Returns the file of the note."""
    path = folder / f"{term.named.replace('/', '-')}.json"
    if path.is_file() and (before := json.loads(path.read_text())) != said:
        log.warning("reward %s is not what this run began with: %s, which was %s", term.named, said, before)
    return path


def note(folder: Path, term: RewardTerm, facts: Mapping[str, Any]) -> None:
    """Writes down, once per run, what a reward model or judge is; warns where it is not what the run began with."""
    said = provenance(term, facts)
    write_atomic(tell_changes(folder, term, said), json.dumps(said, indent=1))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
