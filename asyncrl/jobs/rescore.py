"""`asyncrl rescore RUN --reward fixed.py:f`: every rollout of a run scored again; what that changes; and the run repaired.

RUN is only read, also while it goes on. No Ray and no model, unless `--continue` goes on with the run.
"""

import argparse
import json
import logging
import math
import os
import sys
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import pyarrow.compute as pc
from msgspec.structs import replace

from asyncrl.config import AlgorithmSpec, Recipe, RewardSpec
from asyncrl.config.callables import check_callable
from asyncrl.config.load import load_deployment, load_recipe
from asyncrl.config.paths import resolve_paths
from asyncrl.errors import CheckpointError, ConfigError
from asyncrl.jobs.fork import MIN_ESS, Fork, add_fork_arguments, least_ess, new_paths, old_log, source_of
from asyncrl.prompts.dataset import PromptFile
from asyncrl.replay.log.derived import LogChanges, Which
from asyncrl.replay.log.history import RunHistory, open_history
from asyncrl.replay.log.rows import UNSCORED_COLUMNS, decode_unscored
from asyncrl.replay.scoring import checked
from asyncrl.replay.state import Group, RolloutState
from asyncrl.reward.pool import RewardPool
from asyncrl.reward.shaping import shape
from asyncrl.reward.worker import RewardWorker
from asyncrl.rundir import RunDir
from asyncrl.types import Score, Unscored, UnscoredLease

log = logging.getLogger(__name__)
SAME = 1e-9  # rewards that differ by less are equal, and advantages so near 0 have no sign
_GROUPS = 128  # whose rows are read at a time
_TOLD_EVERY_S = 5.0


def rescore_job(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `asyncrl rescore`, and sets what runs."""
    parser.add_argument("run", type=Path, metavar="RUN", help="the run directory, of a run that goes on or has ended")
    parser.add_argument(
        "--reward",
        metavar="F",
        help="file.py (its compute_score), file.py:name or package.module:name (default: the run's, as its files are now)",
    )
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count() or 1, metavar="N", help="that score (default: one per core)"
    )
    parser.add_argument(
        "--continue",
        dest="name",
        metavar="NAME",
        help="a new run: from the newest checkpoint before the first wrong update, with the stored rollouts, then live",
    )
    add_fork_arguments(parser)
    parser.set_defaults(job=_rescore)


class Stored:
    """The rollouts of a log that a reward function has scored, for a reward worker, which needs nothing else of a store.

    changed: the new verdicts that differ from the old ones, by (group, rollout). It has no limit; nothing else is kept.
    """

    def __init__(self, history: RunHistory) -> None:
        self.changed: dict[Which, Score] = {}
        self.scored: Counter[str] = Counter()  # rollouts, by their data source
        self.missing = 0  # whose rows are deleted
        self.errors: Counter[str] = Counter()  # of the new verdicts
        self.sources: dict[int, str] = {}  # of each group
        self.history = history
        self._coming = self._read()
        self._earned: dict[Which, list[float]] = {}  # per token, as it was, of those that are being scored
        self._told = time.monotonic()

    def lease_unscored(self, k: int, wait_s: float) -> UnscoredLease:
        items = tuple(islice(self._coming, k))
        return UnscoredLease(lease=0, lease_s=math.inf, items=items, ended=not items)

    def extend(self, lease: int) -> None:
        """Nobody else wants them."""

    def score(self, lease: int, scores: Sequence[Score]) -> None:
        for score in scores:
            which = score.group, score.rollout
            old = self.history.groups[score.group].rollouts[score.rollout]
            new = checked(score, old.length)
            self.scored[self.sources[score.group]] += 1
            self.errors.update([new.error] if new.error else [])
            if _differs(old, self._earned.pop(which, None), new):
                self.changed[which] = new
        if time.monotonic() > self._told + _TOLD_EVERY_S:
            self._told = time.monotonic()
            log.info("%d rollouts scored, %d verdicts differ", self.scored.total(), len(self.changed))

    def _read(self) -> Iterator[Unscored]:
        """Those with a verdict, but for answers that no function was asked about."""
        groups = deque(sorted(self.history.groups))
        while groups:
            chunk = [groups.popleft() for _ in range(min(_GROUPS, len(groups)))]
            held = chunk if self.history.holds(chunk) else [group for group in chunk if self.history.holds([group])]
            self.missing += sum(r.row >= 0 for g in set(chunk) - set(held) for r in self.history.groups[g].rollouts)
            rows = self.history.rows(held, [*UNSCORED_COLUMNS, "oldest", "token_rewards"])
            rows = rows.filter(pc.and_(pc.is_valid(rows["oldest"]), pc.not_equal(rows["finish_reason"], "abort")))
            earned = rows["token_rewards"].to_pylist()
            for item, tokens in zip(decode_unscored(rows.select(UNSCORED_COLUMNS)), earned, strict=True):
                if self.history.groups[item.group].rollouts[item.rollout].status is not None:
                    self.sources[item.group] = item.prompt.data_source
                    if tokens is not None:
                        self._earned[item.group, item.rollout] = tokens
                    yield item


def _differs(old: RolloutState, earned: list[float] | None, new: Score) -> bool:
    if old.status != new.status:
        return True
    before, after = earned or [0.0] * len(new.token_rewards or ()), new.token_rewards or [0.0] * len(earned or ())
    pairs = [(old.reward, new.reward or 0.0), *zip(before, after, strict=True)]
    return new.status == "ok" and any(abs(a - b) > SAME for a, b in pairs)


# --------------------------------------------------------------------------------------------------- what it changes


def rewritten(groups: Mapping[int, Group], changed: Mapping[Which, Score], group: int) -> Group:
    """The group under its new verdicts."""
    rollouts = []
    for place, old in enumerate(groups[group].rollouts):
        new = changed.get((group, place))
        if new is not None:
            told = {"reward": new.reward or 0.0, "parts": new.parts, "token_sum": math.fsum(new.token_rewards or ())}
            old = replace(old, status=new.status, **told)
        rollouts.append(old)
    return replace(groups[group], rollouts=rollouts)


def advantages_of(spec: AlgorithmSpec, groups: Sequence[Group]) -> dict[Which, float]:
    """Of each rollout of a batch that has a reward, the mean over its tokens, before rewards are normalized."""
    import torch

    from asyncrl.algorithms.advantages import advantages
    from asyncrl.algorithms.rewards import Outcomes

    ok = [(g.id, place, r) for g in groups if g.ok() for place, r in enumerate(g.sampled()) if r.status == "ok"]
    if not ok:
        return {}
    lengths = torch.tensor([max(1, r.length) for *_, r in ok])
    greedy = {g.id: g.baseline() for g in groups}
    baselines = [baseline.earned for g, *_ in ok if (baseline := greedy[g]) is not None]

    def column(values: Sequence[float]) -> "torch.Tensor":
        return torch.tensor(values, dtype=torch.float64)

    outcomes = Outcomes(
        rewards_s=column([r.reward for *_, r in ok]),
        groups_s=torch.tensor([g for g, *_ in ok]),
        lengths_s=lengths,
        sequence_n=torch.repeat_interleave(torch.arange(len(ok)), lengths),
        token_rewards_n=torch.zeros(int(lengths.sum()), dtype=torch.float64),
        before_s=column([r.token_sum for *_, r in ok]),
        ranked_s=column([r.earned for *_, r in ok]),
        baselines_s=column(baselines) if len(baselines) == len(ok) else None,
    )
    advantages_n, _ = advantages(spec, outcomes)
    means_s = torch.zeros(len(ok), dtype=torch.float64).index_add(0, outcomes.sequence_n, advantages_n) / lengths
    return {(g, place): mean for (g, place, _), mean in zip(ok, means_s.tolist(), strict=True)}


def flipped(spec: AlgorithmSpec, history: RunHistory, changed: Mapping[Which, Score]) -> list[Which] | None:
    """Rollouts of trained batches whose advantage has another sign, or none, or first has one; None where what is stored does
    not say advantages: a critic's values, and the ranks of a preference loss, are made in the update."""
    if spec.needs_critic or spec.learns_preferences:
        return None
    touched, found, told = {group for group, _ in changed}, [], time.monotonic()
    for update, commit in history.commits.items():
        if time.monotonic() > told + _TOLD_EVERY_S:
            told = time.monotonic()
            log.info("advantages compared up to update %d of %d", update, max(history.commits))
        if touched.isdisjoint(commit.groups):
            continue
        old = advantages_of(spec, [history.groups[g] for g in commit.groups])
        new = advantages_of(spec, [rewritten(history.groups, changed, g) for g in commit.groups])
        found += [which for which in old.keys() | new.keys() if _sign(old.get(which, 0.0)) != _sign(new.get(which, 0.0))]
    return found


def _sign(advantage: float) -> int:
    return (advantage > SAME) - (advantage < -SAME)


def findings(history: RunHistory, stored: Stored, flips: Sequence[Which] | None) -> dict[str, dict[str, int | None]]:
    """Counts by data source, and of `all`."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for source, scored in stored.scored.items():
        counts[source]["rollouts"] = scored
    for (group, rollout), new in stored.changed.items():
        old = history.groups[group].rollouts[rollout]
        counts[stored.sources[group]]["statuses" if old.status != new.status else "rewards"] += 1
    for group, _ in flips or ():
        counts[stored.sources[group]]["advantages"] += 1
    counts["all"] = sum(counts.values(), Counter())
    names = ("rollouts", "rewards", "statuses", "advantages")
    return {
        source: {name: None if name == "advantages" and flips is None else of[name] for name in names}
        for source, of in sorted(counts.items(), key=lambda item: (item[0] == "all", item[0]))
    }


def _table(found: Mapping[str, Mapping[str, int | None]]) -> str:
    width = max(len(source) for source in (*found, "data source"))
    lines = [f"{'data source':<{width}}  {'rollouts':>9}  {'rewards':>9}  {'statuses':>9}  {'advantages':>10}"]
    for source, of in found.items():
        rollouts, rewards, statuses, flips = ("–" if value is None else f"{value:,}" for value in of.values())
        lines.append(f"{source:<{width}}  {rollouts:>9}  {rewards:>9}  {statuses:>9}  {flips:>10}")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------- the job


def _rescore(args: argparse.Namespace) -> int:
    """The table goes to standard error; standard output gets one line of JSON, and of a run that goes on one more."""
    source = source_of(args.run)
    recipe = _recipe(args, source)
    paths = new_paths(source, args.name, args.runs_dir) if args.name else None
    if args.processes < 1:
        raise ConfigError(f"--processes={args.processes} < 1: nothing would be scored; use at least 1")
    history = open_history(source.path)
    if args.dry_run and paths is None:
        known = sum(r.status is not None for group in history.groups.values() for r in group.rollouts)
        print(f"{known:,} rollouts of {len(history.groups):,} groups would be scored by {_what(recipe.reward)}")
        return 0
    stored = score_again(source, recipe, history, args.processes)
    log.info("%d rollouts scored, %d verdicts differ; comparing advantages", stored.scored.total(), len(stored.changed))
    flips = flipped(recipe.algorithm, history, stored.changed)
    found = findings(history, stored, flips)
    touched = {group for group, _ in stored.changed}
    first = min((u for u, commit in history.commits.items() if not touched.isdisjoint(commit.groups)), default=None)
    print(_table(found), file=sys.stderr)
    for error, count in stored.errors.most_common(3):
        print(f"{count:,} times: {error}", file=sys.stderr)
    report = {"run": str(source.path), "reward": _what(recipe.reward), "updates": len(history.commits)}
    print(json.dumps({**report, "first_update": first, "missing": stored.missing, **found.pop("all"), "by_source": found}))
    sys.stdout.flush()
    if paths is not None:
        if first is None:
            raise ConfigError(f"no update of {source.path} had a reward that differs: there is nothing to repair")
        fork = _repair(args, source, paths, recipe, stored, first)
        plan = fork.plan()
        if args.dry_run:
            print("\n".join(plan))
        else:
            fork.run()
    return 0


def score_again(source: RunDir, recipe: Recipe, history: RunHistory, processes: int) -> Stored:
    """Scores what the log holds, in as many killable processes, as the run did: deadline, memory, shaping."""
    spec, stored, prompts = recipe.reward, Stored(history), source.data / "train.arrow"
    records = PromptFile(prompts) if prompts.exists() else None
    pool: RewardPool[tuple[object, Unscored]] = RewardPool(
        spec.terms(), processes=processes, deadline_s=spec.deadline_s, memory_bytes=spec.memory_bytes
    )
    worker = RewardWorker(
        stored,
        pool,  # type: ignore[arg-type]
        name="rescore",
        record=lambda item: "{}" if records is None else records.record(item.prompt.row),
        shape=partial(_shaped, recipe),
        poll_s=1.0,
    )
    worker.run()
    return stored


def _shaped(recipe: Recipe, reward: float, response_ids: Sequence[int]) -> tuple[float, dict[str, float]]:
    return shape(reward, response_ids, recipe.reward.shaping, recipe.sampling.max_response_length)


def _recipe(args: argparse.Namespace, source: RunDir) -> Recipe:
    """The run's, with the new reward. Raises ConfigError where the log can't say what would be rewarded."""
    recipe = load_recipe(source.recipe)
    if args.reward is not None:
        function = f"{args.reward}:compute_score" if args.reward.endswith(".py") else args.reward
        spec = replace(recipe.reward, function=function, functions=(), style="auto")
        recipe = resolve_paths(replace(recipe, reward=spec), source)
    if asked := [term.what for term in recipe.reward.terms() if not term.function]:
        raise ConfigError(
            f"{source.path} was rewarded by {', '.join(asked)}, which rescore does not ask again; add --reward file.py:name, a "
            "function of what is stored"
        )
    for term in recipe.reward.terms():
        check_callable(term.function, "--reward")
    return recipe


def _what(spec: RewardSpec) -> str:
    return ", ".join(term.what for term in spec.terms())


def _repair(args: argparse.Namespace, source: RunDir, paths: RunDir, recipe: Recipe, stored: Stored, first: int) -> Fork:
    """The run that goes on from the newest checkpoint before the first update that had wrong rewards."""
    before = [update for update in map(source.update_of, source.steps()) if update < first]
    problems: list[str] = []
    for at in reversed(before):
        try:
            old = old_log(source, recipe, at, end=stored.history.events)  # what a run that goes on added has the old rewards
        except CheckpointError as error:
            problems.append(str(error))
            continue
        return Fork(
            source=source,
            paths=paths,
            at=at,
            recipe=replace(recipe, name=args.name),
            deployment=load_deployment(args.deploy or source.deployment),
            log=old,
            changes=LogChanges(min_ess=least_ess(args, MIN_ESS), scores=stored.changed),
            changed=[f"reward={_what(recipe.reward)}"],
        )
    found = ", ".join(step.name for step in source.steps()) or "none"
    raise ConfigError(
        f"update {first} is the first with wrong rewards, and {source.path} has no checkpoint before it that can be gone on "
        f"from (it has {found}): start a new run, which keeps more with checkpoint.keep_every"
        + "".join(f"\n  {problem}" for problem in problems)
    )
