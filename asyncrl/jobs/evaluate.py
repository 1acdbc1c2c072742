"""`asyncrl eval`: a model's or checkpoint's score on held-out data, by any engine, without Ray. One JSON line at the end."""

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import yaml

from asyncrl.config import DataSpec, Deployment, EpisodeSpec, EvalSettingSpec, Recipe, RewardSpec
from asyncrl.config.base import Rule, require_fields
from asyncrl.config.callables import check_callable, load_callable
from asyncrl.config.load import load_deployment, load_recipe
from asyncrl.config.paths import resolve_paths
from asyncrl.errors import ConfigError, DataError
from asyncrl.generate.engines import engine_kind
from asyncrl.jobs.judging import Pool, reward_of, scoring
from asyncrl.jobs.responses import generated, tickets
from asyncrl.jobs.statistics import ScoredResponse, eval_summary, write_samples, write_transcripts
from asyncrl.learn.policies import Policy, locate
from asyncrl.prompts.dataset import as_prompt, as_record
from asyncrl.prompts.encoding import encoder
from asyncrl.prompts.reading import check_columns, read_rows
from asyncrl.replay.plan import EvalSetting, Evaluation
from asyncrl.report.scores import powers
from asyncrl.reward.pool import score_all
from asyncrl.reward.results import Sample, Verdict
from asyncrl.rundir import RunDir, resolve_run_dir
from asyncrl.types import Episode, Generation, Sampling, Ticket, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_RESPONSE_LENGTH = 1024  # where neither the command nor a run's recipe says


def eval_job(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `asyncrl eval`, and sets what runs."""
    parser.add_argument(
        "model", metavar="MODEL_OR_CHECKPOINT", help="Hugging Face id or folder, runs/NAME, or …/checkpoints/step_N"
    )
    parser.add_argument(
        "--recipe", type=Path, metavar="F", help="recipe file or runs/NAME that says all that a run does (default: the run's)"
    )
    held_out = "parquet or JSONL file; repeatable (default: the run's held-out files)"
    parser.add_argument("--data", action="append", metavar="F", help=held_out)
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
    parser.add_argument(
        "--out", type=Path, metavar="SAMPLES.parquet", help="writes all responses; of episodes a .jsonl beside it"
    )
    parser.add_argument("--tokenizer", default="", help="Hugging Face folder or id (default: the model's, or the run's)")
    parser.add_argument(
        "--dtype", default="", choices=["", "float32", "bfloat16"], help="default: the checkpoint's; else float32"
    )
    parser.add_argument("--deploy", metavar="SPEC", help="a deployment YAML file, for its engine (default: the torch engine)")
    parser.add_argument(
        "--device", default="", choices=["", "cpu", "cuda"], help="default: as --deploy says; without it cuda, if there is one"
    )
    parser.add_argument("--reward-processes", type=int, default=min(4, os.cpu_count() or 1), metavar="N")
    parser.add_argument("--reward-deadline", type=float, metavar="S", help="seconds for one sample (default: the run's, or 10)")
    for key in ("prompt_key", "answer_key", "source_key"):
        parser.add_argument(
            f"--{key.replace('_', '-')}", metavar="KEY", help="as data.{key} of a recipe (default: the run's, or verl's)"
        )
    parser.add_argument("overrides", nargs="*", default=[], metavar="deploy.a.b=c", help="fields of the deployment to change")
    parser.set_defaults(job=_eval)


def _eval(args: argparse.Namespace) -> int:
    """Whatever can be known to fail does so before a model is loaded.

    The line on standard output, and the samples, are the same each time: seeds fix the responses, batches the rounding. (Those
    of episodes are not: which of them meet in a batch depends on their environments.)
    """
    began = time.monotonic()
    _check_numbers(args)
    ks = _ks(args.k, args.n)
    also = [_also(text) for text in args.also]
    policy = locate(args.model, args.tokenizer, args.dtype)
    if args.recipe is not None:
        policy = msgspec.structs.replace(policy, recipe=_recipe(args.recipe))
    reward, data = reward_of(args, policy), _data(args, policy)
    for field, name in _episode(args, policy).found_here:
        check_callable(name, f"episode.{field}")
    named = args.metric or (policy.recipe.evaluation.metrics if policy.recipe else ())
    metrics = [load_callable(metric, "--metric") for metric in named]
    check_columns(data.files, data)
    if args.out and {args.out.resolve(), args.out.with_suffix(".jsonl").resolve()} & {
        Path(file).resolve() for file in data.files
    }:
        raise ConfigError(f"--out {args.out} and its transcripts would replace the held-out data; name another file")

    deployment = load_deployment(args.deploy, args.overrides)
    kind = engine_kind(deployment.generators.engine.kind)
    kind.check(deployment)
    if problem := kind.not_served(policy.spec, {}):
        raise ConfigError(f"{args.model} can't be served by this engine: {problem}")

    models, responses = _evaluate(args, also, policy, data, reward, deployment)
    if args.out is not None:
        write_samples(args.out, responses)
        write_transcripts(args.out.with_suffix(".jsonl"), responses)
    of = {name: [one for one in responses if one.setting == name] for name in ("", *(setting.name for setting in also))}
    figures = eval_summary(of[""], ks, args.pass_score, metrics)
    for setting in also:
        more = eval_summary(of[setting.name], powers(setting.n), args.pass_score, metrics)
        figures[setting.name] = more | {"n": setting.n, "temperature": setting.temperature}
    report = {"model": args.model, "data": list(data.files), **figures, "n": args.n, "temperature": args.temperature}
    print(json.dumps({**report, "seed": args.seed, **({"rewards": models} if models else {})}))
    print(f"{len(responses)} samples in {time.monotonic() - began:.1f} s", file=sys.stderr)
    return 0


def _evaluate(
    args: argparse.Namespace,
    also: Sequence[EvalSettingSpec],
    policy: Policy,
    data: DataSpec,
    reward: RewardSpec,
    deployment: Deployment,
) -> tuple[dict[str, Any], list[ScoredResponse]]:
    """What the reward's models and judges are, by name; and all responses."""
    place = _place(args, deployment)
    run = args.recipe or (policy.checkpoint.parents[1] if policy.checkpoint else Path(args.model))
    # first: a reward that can't be loaded is known before the model is
    with scoring(reward, place, args.reward_processes, run) as (pool, models):
        from asyncrl.models.tokenizing import load_tokenizer

        tokenizer = load_tokenizer(policy.spec)
        encode = encoder(tokenizer)
        rows = [(as_prompt(row, encode), as_record(row)) for row in itertools.islice(read_rows(data), args.limit)]
        records = {prompt.row: record for prompt, record in rows}
        sampling = _sampling(args, policy, tokenizer, longest=max(len(prompt.ids) for prompt, _ in rows))
        settings = [EvalSetting("", sampling, args.n)]
        for a in also:
            other = msgspec.structs.replace(sampling, temperature=a.temperature, top_p=a.top_p, top_k=a.top_k)
            settings.append(EvalSetting(a.name, other, a.n))
        held_out = Evaluation(prompts=[prompt for prompt, _ in rows], settings=tuple(settings))
        asked = tickets(held_out, args.seed)
        generations = generated(policy, _episode(args, policy), place, asked, records, args.seed)
        texts = [tokenizer.decode(generation.token_ids, skip_special_tokens=True) for generation in generations]
        each = [(ticket, *one) for ticket in asked for one in zip(ticket.rollouts, ticket.seeds, strict=True)]
        samples = [
            _sample(ticket, text, generation, records[ticket.prompt.row])
            for (ticket, *_), text, generation in zip(each, texts, generations, strict=True)
        ]
        verdicts = _verdicts(pool, samples, generations)
        prompt_texts = {prompt.row: tokenizer.decode(prompt.ids, skip_special_tokens=True) for prompt, _ in rows}
    return models, [
        ScoredResponse(
            prompt=ticket.prompt,
            rollout=rollout,
            seed=seed,
            generation=generation,
            prompt_text=prompt_texts[ticket.prompt.row],
            text=text,
            verdict=verdict,
            setting=held_out.at(ticket.group)[0].name,
        )
        for (ticket, rollout, seed), generation, text, verdict in zip(each, generations, texts, verdicts, strict=True)
    ]


def _verdicts(pool: Pool, samples: Sequence[Sample], generations: Sequence[Generation]) -> list[Verdict]:
    """On each response. An episode that did not come to an end has its own, as in a run."""
    lost = [_lost(generation) for generation in generations]
    scored = iter(score_all(pool, [sample for sample, verdict in zip(samples, lost, strict=True) if verdict is None]))
    return [verdict or next(scored) for verdict in lost]


def _lost(generation: Generation) -> Verdict | None:
    end = generation.episode if isinstance(generation, Trajectory) else Episode()
    if end.status == "ok":
        return None if generation.token_ids else Verdict("invalid", error="no token chosen by the policy")
    return Verdict(end.status, error=end.error)


def _sample(ticket: Ticket, text: str, generation: Generation, record: str) -> Sample:
    of = ticket.prompt
    texts = of.data_source, text, of.ground_truth, of.extra_info, record
    sample = Sample(*texts, generation.token_ids, group=ticket.group, purpose="eval")
    if not isinstance(generation, Trajectory):
        return sample
    return msgspec.structs.replace(sample, turns=generation.turns, episode=generation.episode.for_rewards("eval"))


def _place(args: argparse.Namespace, deployment: Deployment) -> Deployment:
    """The same with the slots and the device of the command line. All models compute with this process's threads."""
    import torch

    replace, generators, rewards = msgspec.structs.replace, deployment.generators, deployment.rewards
    engine = replace(generators.engine, slots=args.batch or generators.engine.slots)
    place, models_place = generators.place, replace(rewards.models.place, threads=torch.get_num_threads())
    if args.device or args.deploy is None:
        device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        place, models_place = (
            replace(one, gpus=max(one.gpus, 1.0) if device == "cuda" else 0.0) for one in (place, models_place)
        )
    generators = replace(generators, engine=engine, place=place)
    rewards = replace(rewards, models=replace(rewards.models, place=models_place))
    return replace(deployment, generators=generators, rewards=rewards)


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


def _recipe(path: Path) -> Recipe:
    """Of a run, or a file; `{run}` in it is the run of its name."""
    if (saved := RunDir(path).recipe).is_file():
        return msgspec.json.decode(saved.read_bytes(), type=Recipe)
    recipe = load_recipe(path)
    return resolve_paths(recipe, resolve_run_dir(recipe.name), path.resolve().parent)


def _episode(args: argparse.Namespace, policy: Policy) -> EpisodeSpec:
    """What a response is."""
    episode = policy.recipe.episode if policy.recipe else EpisodeSpec()
    return episode if args.max_response_length is None else msgspec.structs.replace(episode, max_turn_tokens=None)


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
