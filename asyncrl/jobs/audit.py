"""`asyncrl audit RUN algorithm.a=b … + …`: what other losses, corrections, masks, estimators would have made of its batches."""

import argparse
import itertools
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from asyncrl.config import AlgorithmSpec, Recipe
from asyncrl.config.load import override
from asyncrl.errors import ConfigError
from asyncrl.jobs.replay import LINE_EVERY_S, local_ranks, past_run, run_and_specs, working_folder
from asyncrl.learn.past import choose_updates, own_checkpoints
from asyncrl.replay.log.history import open_history

if TYPE_CHECKING:
    from rich.table import Table

    from asyncrl.learn.retraining import PastRun, UnlikeMetric
    from asyncrl.learn.trainer import PolicyTrainer

_OWN = "as it ran"
_FIELD = "algorithm."
# A column of the table, the figure that it shows, and how.
_COLUMNS = (
    ("ESS", "correction/ess", ".3f"),
    ("capped", "correction/cap_share", ".2%"),
    ("masked", "correction/masked_share", ".2%"),
    ("KL k1", "gap/k1", ".2e"),
    ("KL k3", "gap/k3", ".2e"),
    ("norm", "gradient/norm", ".4g"),
    ("cosine", "gradient/cosine", ".4f"),
    *((f"length q{quarter}", f"length/weight_q{quarter}", ".1%") for quarter in range(1, 5)),
)
_BY_LAG = (
    ("weight", "gradient/weight_lag", ".1%"),
    ("norm", "gradient/norm_lag", ".4g"),
    ("cosine", "gradient/cosine_lag", ".4f"),
    ("to lag 0", "gradient/cosine_to_fresh_lag", ".4f"),
    ("ESS", "correction/ess_lag", ".3f"),
    ("masked", "correction/masked_share_lag", ".2%"),
)


class AuditedSetting(Struct, frozen=True, kw_only=True):
    """What a setting would have done: figures on average, and of each audited update."""

    setting: str
    mean: dict[str, float]
    updates: list[dict[str, float]]


class Audit(Struct, frozen=True, kw_only=True):
    """What `--json` prints. as_logged: whether the weights were, to the bit, those of the run, as far as its metrics tell."""

    run: str
    updates: list[int]  # that were audited
    as_logged: bool
    seconds: float
    settings: list[AuditedSetting]


def audit_job(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `asyncrl audit`, and sets what runs."""
    parser.add_argument("run", metavar="RUN", help="a run directory, runs/NAME; nothing in it is changed")
    parser.add_argument(
        "--from", dest="begin", type=int, metavar="STEP", help="checkpoint to go on from, as of `asyncrl replay`"
    )
    parser.add_argument("--to", dest="end", type=int, metavar="STEP", help="last update (default: the newest)")
    every = "of the updates, audit the first and every K-th after it (default 1: all); what a checkpoint saves is not trained"
    parser.add_argument("--every", type=int, default=1, metavar="K", help=every)
    parser.add_argument("--json", action="store_true", help="print one JSON object with the figures of each update, no table")
    settings = (
        "fields of the run's recipe to change; a + between two settings: algorithm.policy_loss=gspo + algorithm.masks=icepop"
    )
    parser.add_argument("overrides", nargs="*", default=[], metavar="algorithm.a=b", help=settings)
    parser.set_defaults(job=_audit)


def _audit(args: argparse.Namespace) -> int:
    """Nothing is loaded before every setting is known to be one that can be asked."""
    run, recipe, deployment = run_and_specs(args.run)
    if args.every < 1:
        raise ConfigError(f"--every {args.every} < 1: no update would be audited; use at least 1")
    settings = parse_settings(recipe, args.overrides)
    history = open_history(run.path)
    begin, end = choose_updates(run, history, args.begin, args.end)
    local = local_ranks(run, history, begin, recipe, deployment)
    if local.count > 1:
        print(f"the run had {local.count} ranks, here is one: its sums are those of the run to rounding", file=sys.stderr)
        local = replace(local, layouts={"learner": type(local.layouts["learner"])()})
    os.environ["OMP_NUM_THREADS"] = str(local.threads)  # read when torch is first imported
    from asyncrl.models.ranks import Ranks

    print(f"updates {begin + 1} to {end}, from the checkpoint of {begin}: loading", file=sys.stderr)
    chosen = list(range(begin + 1, end + 1, args.every))
    with working_folder() as work:
        past = past_run(run, recipe, history, local, work, Ranks(local.layouts))
        past.load(begin)
        found = _walk(past, _trainers(recipe, past.trainer, settings, local.device), chosen, own_checkpoints(run, history))
    audit = replace(found, run=str(run.path))
    if args.json:
        print(msgspec.json.encode(audit).decode())
    else:
        _show(audit)
    return 0


def parse_settings(recipe: Recipe, words: Sequence[str]) -> dict[str, AlgorithmSpec]:
    """The algorithm of each setting, by what is written of it. Raises ConfigError, as of a recipe, and for what the log can't
    answer."""
    recipe = replace(recipe, algorithm=recipe.algorithm.unresolved)
    settings: dict[str, AlgorithmSpec] = {}
    if any(pair == ("+", "+") for pair in itertools.pairwise(["+", *words, "+"])) and words:
        raise ConfigError(f"{' '.join(words)}: a + stands between two settings; one of them is missing")
    for is_plus, group in itertools.groupby(words, key="+".__eq__):
        if is_plus:
            continue
        setting = list(group)
        for word in setting:
            if not word.startswith(_FIELD):
                raise ConfigError(
                    f"{word!r}: only algorithm.FIELD=VALUE changes what is made of a stored batch; all else the run "
                    "has decided; leave it out"
                )
        algorithm = override(recipe, setting).algorithm
        if problem := _unanswerable(algorithm, recipe.algorithm):
            raise ConfigError(f"{' '.join(setting)}: {problem}; ask for something else, or make a run of it")
        settings[" ".join(word.removeprefix(_FIELD) for word in setting)] = algorithm.resolved
    return settings


def _unanswerable(asked: AlgorithmSpec, own: AlgorithmSpec) -> str:
    """What a setting would need that the run has not kept; empty if nothing."""
    if asked.needs_critic and not own.needs_critic:
        return "the run had no critic, and values can't be made up afterwards"
    if asked.wants_baseline and not own.wants_baseline:
        return "the run made no greedy rollouts to compare with"
    if asked.reward_normalization == "running" != own.reward_normalization:
        return "moments of the rewards of all updates before were not kept"
    if asked.kl_control == "adaptive" != own.kl_control:
        return "the coefficient depends on all updates before, which were not made with it"
    return ""


def _trainers(
    recipe: Recipe, own: "PolicyTrainer", settings: Mapping[str, AlgorithmSpec], device: str
) -> "dict[str, PolicyTrainer]":
    """One for each setting, all with the models of the run's own."""
    from asyncrl.learn.build import other_trainer, reference_model
    from asyncrl.models.ranks import Ranks

    assert own.actor is not None, "the only rank has the policy"
    reference = own.reference
    if reference is None and any(algorithm.needs_reference for algorithm in settings.values()):
        reference = reference_model(recipe, own.actor.policy, device, Ranks())
    return {name: other_trainer(recipe, own, algorithm, reference) for name, algorithm in settings.items()}


def _walk(past: "PastRun", others: "dict[str, PolicyTrainer]", chosen: Sequence[int], saved: Sequence[int]) -> Audit:
    """Audits the chosen updates, one after the other. Between them the run is trained again, from its newest checkpoint."""
    from asyncrl.learn.alternatives import audited_update, mean_figures

    began = told = time.monotonic()
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ("", *others)}
    first: UnlikeMetric | None = None
    for update in chosen:
        if (nearest := max((c for c in saved if c < update and past.saves(c)), default=0)) > past.committed:
            past.load(nearest)
        while past.committed < update:
            last = past.committed + 1 == update
            told = _tell(past.committed, chosen[-1], began, told)
            if not last:
                metrics = past.step(past.batch())
            else:
                metrics, figures = audited_update(past.trainer, others, past.batch(), past.committed)
                past.committed += 1
            unlike, _ = past.unlike_metrics(metrics)
            if unlike and first is None:
                first = unlike[0]
                print(f"not to the bit as it ran, first at {first}: the weights are nearly the run's", file=sys.stderr)
        for name, of in figures.items():
            found[name].append(of)
    settings = [AuditedSetting(setting=name or _OWN, mean=mean_figures(of), updates=of) for name, of in found.items()]
    return Audit(run="", updates=list(chosen), as_logged=first is None, seconds=time.monotonic() - began, settings=settings)


def _tell(update: int, end: int, began: float, told: float) -> float:
    """A line of progress, if none was written for some seconds; when the newest was."""
    if (now := time.monotonic()) - told < LINE_EVERY_S:
        return told
    print(f"update {update}/{end}: {now - began:.1f} s", file=sys.stderr)
    return now


def _show(audit: Audit) -> None:
    """The means as tables: of each setting, and of each lag of it."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=200)  # for a file or a pipe: no line is broken
    lags = sorted({int(name.rpartition("_")[2]) for of in audit.settings for name in of.mean if "norm_lag_" in name})
    first, last = audit.updates[0], audit.updates[-1]
    over = f"means over {len(audit.updates)} updates, {first} to {last}"
    table = _table(f"{over}; length q1 to q4: share of the gradient's weight, shortest to longest responses", ["setting"])
    for column, _, _ in _COLUMNS:
        table.add_column(column, justify="right")
    for of in audit.settings:
        table.add_row(of.setting, *(_cell(of.mean, name, form) for _, name, form in _COLUMNS))
    tokens = audit.settings[0].mean
    shares = [_cell(tokens, f"length/tokens_q{quarter}", ".1%") for quarter in range(1, 5)]
    table.add_row("(of the tokens)", *[""] * (len(_COLUMNS) - 4), *shares, style="dim")
    console.print(table)
    if len(lags) < 2:
        return
    by_lag = _table(
        "by lag, over updates that have it; cosine: to the run's own gradient; to lag 0: of the same setting",
        ["setting", "lag"],
    )
    for column, _, _ in _BY_LAG:
        by_lag.add_column(column, justify="right")
    for of in audit.settings:
        for lag in lags:
            cells = [_cell(of.mean, f"{name}_{lag}", form) for _, name, form in _BY_LAG]
            by_lag.add_row(of.setting if lag == lags[0] else "", str(lag), *cells, end_section=lag == lags[-1])
    console.print(by_lag)


def _table(title: str, columns: Sequence[str]) -> "Table":
    from rich import box
    from rich.table import Table

    return Table(*columns, title=title, title_justify="left", box=box.SIMPLE)


def _cell(mean: Mapping[str, Any], name: str, form: str) -> str:
    return format(mean[name], form) if name in mean and not math.isnan(mean[name]) else ""
