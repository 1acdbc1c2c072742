"""`asyncrl eval`: a model's or checkpoint's score on held-out data, by any engine, without Ray. One JSON line at the end."""

import argparse
import contextlib
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import wait
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import yaml

from asyncrl.config import DataSpec, Deployment, EvalSettingSpec, GeneratorsSpec, LimitsSpec, RewardTerm
from asyncrl.config.base import Rule, require_fields
from asyncrl.config.callables import check_callable, load_callable
from asyncrl.config.load import load_deployment
from asyncrl.errors import ConfigError, DataError
from asyncrl.generate.engines import EngineSite, engine_kind
from asyncrl.interfaces import Engine
from asyncrl.jobs.statistics import ScoredResponse, eval_summary, write_samples
from asyncrl.learn.policies import Policy, load, locate
from asyncrl.prompts.dataset import as_prompt, as_record
from asyncrl.prompts.encoding import encoder
from asyncrl.prompts.reading import check_columns, read_rows
from asyncrl.replay.plan import EvalSetting, Evaluation
from asyncrl.report.scores import powers
from asyncrl.reward.pool import RewardPool
from asyncrl.reward.results import Sample
from asyncrl.scratch import ScratchFolder
from asyncrl.types import Generation, GenerationRequest, Prompt, Sampling, Version, derive_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_RESPONSE_LENGTH = 1024  # where neither the command nor a run's recipe says


def eval_job(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `asyncrl eval`, and sets what runs."""
    parser.add_argument(
        "model", metavar="MODEL_OR_CHECKPOINT", help="Hugging Face id or folder, runs/NAME, or …/checkpoints/step_N"
    )
    parser.add_argument(
        "--data",
        action="append",
        metavar="F",
        help="parquet or JSONL file; repeatable (default: the run's held-out files)",
    )
    parser.add_argument(
        "--reward",
        metavar="F",
        help="file.py (its compute_score), file.py:name or package.module:name (default: the run's, unshaped)",
    )
    parser.add_argument("--n", type=int, default=1, help="responses per prompt (default 1)")
    parser.add_argument("--k", metavar="K,K,…", help="pass@k and maj@k for these (default: 1, 2, 4, … and n)")
    parser.add_argument("--pass-score", type=float, default=1.0, help="a response passes from this score on (default 1)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (the default)")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument(
        "--also",
        action="append",
        default=[],
        metavar="SETTING",
        help="sample otherwise too, in the same pass: '{name: sampled, temperature: 0.6, n: 16}'; repeatable",
    )
    parser.add_argument(
        "--metric", action="append", metavar="F", help="as evaluation.metrics of a recipe; repeatable (default: the run's)"
    )
    parser.add_argument(
        "--max-response-length", type=int, help=f"tokens (default: the run's; else {_RESPONSE_LENGTH}, or what fits)"
    )
    parser.add_argument("--limit", type=int, help="only the first so many prompts")
    parser.add_argument(
        "--batch", type=int, metavar="SLOTS", help="responses decoded together (default: the engine's slots, 256)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="SAMPLES.parquet", help="where to write every response with its score")
    parser.add_argument("--tokenizer", default="", help="Hugging Face folder or id (default: the model's, or the run's)")
    parser.add_argument(
        "--dtype", default="", choices=["", "float32", "bfloat16"], help="default: the checkpoint's; else float32"
    )
    parser.add_argument("--deploy", metavar="SPEC", help="a deployment YAML file, for its engine (default: the torch engine)")
    parser.add_argument(
        "--device", default="", choices=["", "cpu", "cuda"], help="default: as --deploy says; without it cuda, if there is one"
    )
    parser.add_argument("--reward-processes", type=int, default=min(4, os.cpu_count() or 1), metavar="N")
    parser.add_argument("--reward-deadline", type=float, default=10.0, metavar="S", help="seconds for one sample (default 10)")
    for key in ("prompt_key", "answer_key", "source_key"):
        parser.add_argument(
            f"--{key.replace('_', '-')}", metavar="KEY", help="as data.{key} of a recipe (default: the run's, or verl's)"
        )
    parser.add_argument("overrides", nargs="*", default=[], metavar="deploy.a.b=c", help="fields of the deployment to change")
    parser.set_defaults(job=_eval)


def _eval(args: argparse.Namespace) -> int:
    """Whatever can be known to fail does so before a model is loaded.

    The line on standard output, and the samples, are the same each time: seeds fix the responses, batches the rounding.
    """
    began = time.monotonic()
    _check_numbers(args)
    ks = _ks(args.k, args.n)
    also = [_also(text) for text in args.also]
    policy = locate(args.model, args.tokenizer, args.dtype)
    terms, data = _terms(args, policy), _data(args, policy)
    for term in terms:
        check_callable(term.function, "--reward")
    named = args.metric or (policy.recipe.evaluation.metrics if policy.recipe else ())
    metrics = [load_callable(metric, "--metric") for metric in named]
    check_columns(data.files, data)

    deployment = load_deployment(args.deploy, args.overrides)
    kind = engine_kind(deployment.generators.engine.kind)
    kind.check(deployment)
    if problem := kind.not_served(policy.spec, {}):
        raise ConfigError(f"{args.model} can't be served by this engine: {problem}")

    responses = _evaluate(args, also, policy, data, terms, deployment)
    if args.out is not None:
        write_samples(args.out, responses)
    of = {name: [one for one in responses if one.setting == name] for name in ("", *(setting.name for setting in also))}
    figures = eval_summary(of[""], ks, args.pass_score, metrics)
    for setting in also:
        more = eval_summary(of[setting.name], powers(setting.n), args.pass_score, metrics)
        figures[setting.name] = more | {"n": setting.n, "temperature": setting.temperature}
    report = {"model": args.model, "data": list(data.files), **figures, "n": args.n, "temperature": args.temperature}
    print(json.dumps({**report, "seed": args.seed}))
    print(f"{len(responses)} samples in {time.monotonic() - began:.1f} s", file=sys.stderr)
    return 0


def _generate(engine: Engine, requests: Sequence[GenerationRequest], health_timeout_s: float) -> list[Generation]:
    """The responses to `requests`, in order. Raises what ended the engine, and Unavailable if it makes no progress.

    requests: those of a group together. The same seeds give the same responses of an engine in this process: all requests are
    there before its first step, so that the batches, and with them the rounding, repeat.
    """
    engine.pause()
    futures = []
    for _, group in itertools.groupby(requests, key=lambda request: request.group):
        futures += engine.submit_group(list(group))
    engine.resume()
    while wait(futures, timeout=health_timeout_s).not_done:
        engine.health(health_timeout_s)
    return [future.result() for future in futures]


def _evaluate(
    args: argparse.Namespace,
    also: Sequence[EvalSettingSpec],
    policy: Policy,
    data: DataSpec,
    terms: Sequence[RewardTerm],
    deployment: Deployment,
) -> list[ScoredResponse]:
    pool: RewardPool[int] = RewardPool(terms, processes=args.reward_processes, deadline_s=args.reward_deadline)
    with pool:  # first: a reward that can't be loaded is known before the model is
        from asyncrl.models.tokenizing import load_tokenizer

        tokenizer = load_tokenizer(policy.spec)
        encode = encoder(tokenizer)
        rows = [(as_prompt(row, encode), as_record(row)) for row in itertools.islice(read_rows(data), args.limit)]
        records = {prompt.row: record for prompt, record in rows}
        longest = max(len(prompt.ids) for prompt, _ in rows)
        sampling = _sampling(args, policy, tokenizer, longest)
        settings = [EvalSetting("", sampling, args.n)]
        for a in also:
            other = msgspec.structs.replace(sampling, temperature=a.temperature, top_p=a.top_p, top_k=a.top_k)
            settings.append(EvalSetting(a.name, other, a.n))
        per_prompt = sum(setting.n for setting in settings)
        generators = _generators(args, deployment, max_length=longest + sampling.max_tokens, responses=per_prompt * len(rows))
        where = f"{generators.engine.kind} engine on {'cuda' if generators.place.gpus else 'cpu'}"
        print(f"{len(rows)} prompts × {per_prompt}, at most {sampling.max_tokens} tokens each, by the {where}", file=sys.stderr)
        asked = list(_asked(Evaluation(prompts=[prompt for prompt, _ in rows], settings=tuple(settings)), args.seed))
        requests = [one.request for one in asked]
        with _engine(policy, generators, deployment.limits) as engine:
            generations = _generate(engine, requests, deployment.limits.health_timeout_s)
        texts = [tokenizer.decode(generation.token_ids, skip_special_tokens=True) for generation in generations]
        verdicts = pool.map(
            [
                Sample(of.data_source, text, of.ground_truth, of.extra_info, records[of.row], generation.token_ids)
                for of, text, generation in zip((one.prompt for one in asked), texts, generations, strict=True)
            ]
        )
        prompt_texts = {prompt.row: tokenizer.decode(prompt.ids, skip_special_tokens=True) for prompt, _ in rows}
    return [
        ScoredResponse(
            prompt=one.prompt,
            rollout=one.rollout,
            seed=one.request.seed,
            generation=generation,
            prompt_text=prompt_texts[one.prompt.row],
            text=text,
            verdict=verdict,
            setting=one.setting,
        )
        for one, generation, text, verdict in zip(asked, generations, texts, verdicts, strict=True)
    ]


class _Asked(NamedTuple):
    prompt: Prompt
    setting: str
    rollout: int
    request: GenerationRequest


def _asked(held_out: Evaluation, seed: int) -> Iterator[_Asked]:
    """Every response that is asked for, those of a prompt and setting together."""
    for position in range(held_out.total):
        setting, prompt = held_out.at(position)
        for rollout in range(setting.n):
            request = GenerationRequest(
                id=f"{position}.{rollout}",
                group=position,
                prompt_ids=prompt.ids,
                sampling=setting.sampling,
                seed=derive_seed(seed, prompt.row, rollout),
            )
            yield _Asked(prompt, setting.name, rollout, request)


@contextlib.contextmanager
def _engine(policy: Policy, generators: GeneratorsSpec, limits: LimitsSpec) -> Iterator[Engine]:
    """An engine as a generator of a run has one: started, and given the policy's weights."""
    from asyncrl.models.loading import export, named_weights

    with contextlib.closing(ScratchFolder()) as scratch:
        spec = policy.spec
        model, tokenizer = load(policy)
        if policy.checkpoint is not None and not spec.builder:  # an engine loads Hugging Face folders only
            dtype = str(model.dtype).removeprefix("torch.")
            spec = msgspec.structs.replace(spec, path=f"{scratch.path}/model", dtype=dtype)
            export(model, tokenizer, Path(spec.path))
        if (served := generators.engine.dtype) != "auto":
            spec = msgspec.structs.replace(spec, dtype=served)
        site = EngineSite(generators=generators, model=spec, limits=limits, name="eval", logs=scratch.path)
        engine = engine_kind(generators.engine.kind).build(site)
        try:
            engine.start()
            engine.update_weights(Version(0, 0), named_weights(model))
            del model  # the engine has its own
            yield engine
        finally:
            engine.close()


def _generators(args: argparse.Namespace, deployment: Deployment, *, max_length: int, responses: int) -> GeneratorsSpec:
    """One generator of the deployment, as long and as wide as this evaluation needs it."""
    generators = deployment.generators
    slots = min(args.batch or generators.engine.slots, responses)
    engine = msgspec.structs.replace(generators.engine, slots=slots, max_length=max_length)
    place = generators.place
    if args.device or args.deploy is None:
        import torch

        device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        place = msgspec.structs.replace(place, gpus=max(place.gpus, 1.0) if device == "cuda" else 0.0)
    return msgspec.structs.replace(generators, count=1, engine=engine, place=place)


def _sampling(args: argparse.Namespace, policy: Policy, tokenizer: "PreTrainedTokenizerBase", longest: int) -> Sampling:
    from asyncrl.models.loading import context
    from asyncrl.models.tokenizing import stop_token_ids

    positions = context(policy.spec)[1] or sys.maxsize
    room = positions - longest
    if room < 1:
        raise DataError(
            f"the longest prompt has {longest} tokens, and the model knows {positions} positions: nothing could be generated"
        )
    wanted = args.max_response_length
    if wanted is None:
        wanted = min(room, policy.recipe.sampling.max_response_length if policy.recipe else _RESPONSE_LENGTH)
    if wanted > room:
        raise ConfigError(
            f"--max-response-length={wanted} > {room}: the model knows {positions} positions and the longest prompt has "
            f"{longest} tokens, so responses would not fit; use at most {room}"
        )
    return Sampling(
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=0,
        max_tokens=wanted,
        stop_token_ids=stop_token_ids(tokenizer, policy.spec),
    )


def _terms(args: argparse.Namespace, policy: Policy) -> tuple[RewardTerm, ...]:
    if args.reward is not None:
        return (RewardTerm(function=f"{args.reward}:compute_score" if args.reward.endswith(".py") else args.reward),)
    if policy.recipe is None:
        raise ConfigError(f"{args.model} is no run with a recipe, so nothing says how to score; add --reward file.py:name")
    if policy.recipe.episode.what:
        raise ConfigError(
            f"{args.model} was trained on episodes (its recipe has an environment, agent or tools), which asyncrl eval does "
            "not run: single answers would be another task; evaluate in a run (evaluation.files), or add --reward"
        )
    terms = policy.recipe.reward.terms()
    if asked := [term.what for term in terms if not term.function]:
        raise ConfigError(
            f"{args.model} was rewarded by {', '.join(asked)}, which asyncrl eval does not ask: evaluate in a run "
            "(evaluation.files), or add --reward file.py:name"
        )
    return terms


def _data(args: argparse.Namespace, policy: Policy) -> DataSpec:
    files = tuple(args.data or (policy.recipe.evaluation.files if policy.recipe else ()))
    if not files:
        raise ConfigError(f"{args.model} is no run with held-out files, so there are no prompts; add --data FILE")
    base = policy.recipe.data if policy.recipe else DataSpec(files=files)
    given = {key: getattr(args, key) for key in ("prompt_key", "answer_key", "source_key") if getattr(args, key) is not None}
    return msgspec.structs.replace(base, files=files, **given)


def _also(text: str) -> EvalSettingSpec:
    try:
        return msgspec.convert(yaml.safe_load(text), EvalSettingSpec)
    except (msgspec.ValidationError, yaml.YAMLError) as error:
        raise ConfigError(f"--also={text}: {error}; write it as '{{name: sampled, temperature: 0.6, n: 16}}'") from error


def _ks(text: str | None, n: int) -> list[int]:
    """The k of pass@k and maj@k, rising. Raises ConfigError for what is no number of responses out of n."""
    if text is None:
        return powers(n)
    try:
        ks = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise ConfigError(f"--k={text}: expected numbers with commas between, for example 1,8") from None
    if not 1 <= ks[0] <= ks[-1] <= n:
        raise ConfigError(f"--k={text} is outside [1, --n={n}]: k responses are drawn from n; raise --n")
    return ks


def _check_numbers(args: argparse.Namespace) -> None:
    rules: list[Rule] = [
        ("n max-response-length limit batch reward-processes", lambda x: x >= 1, "< 1: nothing would be scored; use >= 1"),
        ("temperature", lambda x: x >= 0, "< 0: logits are divided by it; use > 0, or 0 for greedy decoding"),
        ("top-p", lambda x: 0 < x <= 1, "is outside (0, 1]; 1 turns it off"),
        ("reward-deadline", lambda x: x > 0, "<= 0: every sample would time out; use seconds > 0"),
    ]
    options = argparse.Namespace(**{name.replace("_", "-"): value for name, value in vars(args).items()})
    require_fields(options, "--", rules)
    if args.out is not None and args.out.suffix != ".parquet":
        raise ConfigError(f"--out={args.out}: samples are written as parquet; name a .parquet file")
    if args.n > 1 and args.temperature == 0:
        raise ConfigError(
            f"--n={args.n} with --temperature=0: greedy decoding would give {args.n} equal responses; set --temperature"
        )
