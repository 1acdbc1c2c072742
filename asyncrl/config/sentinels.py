"""What is watched for while a run goes on: conditions over its metrics and rollouts, three of them ready. No torch, no DuckDB.

sentinels={
    "entropy": entropy_collapse(then="stop"),
    "stale": SentinelSpec(when='"staleness/lag_mean" > 8', patience=3),
    "silent": SentinelSpec(when="select avg((response = '')::int) > 0.1 as silent from rollouts", window=5),
}
"""

from typing import Literal

from asyncrl.config.base import Rule, Spec, require_fields

Consequence = Literal["warn", "checkpoint", "stop"]


class SentinelSpec(Spec, frozen=True, kw_only=True):
    """A condition that is looked at while a run goes on, and what happens when it begins to hold."""

    # A condition on the newest update, metrics under their names in double quotes: `"actor/entropy" < 0.05`. Or a query of
    # DuckDB's SQL over the tables `updates` and `rollouts`, which holds where it returns a row; of truth values alone, `true`.
    when: str
    # `warn`: a line in the log. `checkpoint`: also a checkpoint that stays for ever. `stop`: the run saves and ends, with an
    # error. In each case `sentinels.jsonl` of the run directory gets the rows that the query returned.
    then: Consequence = "warn"
    every: int = 1  # updates between two looks
    window: int | None = 20  # updates in the tables, up to the one that is looked at; null: all of the run
    patience: int = 1  # looks in a row at which it must hold

    def __post_init__(self) -> None:
        rules: list[Rule] = [
            ("when", lambda x: x.strip(" \n\t;") != "", "is no condition; for example '\"actor/entropy\" < 0.05'"),
            (
                "then",
                lambda x: x in ("warn", "checkpoint", "stop"),
                "can't be done; use warn, checkpoint or stop",
            ),
            ("every window patience", lambda x: x >= 1, "< 1: it would never be looked at; use at least 1"),
        ]
        require_fields(self, "sentinels: ", rules)


def entropy_collapse(share: float = 0.1, then: Consequence = "warn") -> SentinelSpec:
    """The policy has stopped exploring: over the newest 5 updates its entropy per token is below `share` of what it was over
    the run's first 10."""
    query = f"""
        select avg("actor/entropy") filter (step <= 10) as at_first, avg("actor/entropy") filter (age < 5) as now
        from updates having count("actor/entropy") >= 15 and now < {share} * at_first"""
    return SentinelSpec(when=" ".join(query.split()), then=then, every=5, window=None)


def length_explosion(times: float = 2.0, then: Consequence = "warn") -> SentinelSpec:
    """Responses grow by themselves: over the newest 5 updates their mean length is at least `times` what it was 15 updates
    before, in two looks that are 5 updates apart."""
    query = f"""
        select avg("response_length/mean") filter (age >= 15) as before, avg("response_length/mean") filter (age < 5) as now,
            avg("response_length/clip_ratio") filter (age < 5) as cut_off
        from updates having count("response_length/mean") >= 20 and now >= {times} * before"""
    return SentinelSpec(when=" ".join(query.split()), then=then, every=5, patience=2)


def reward_hacking(drop: float = 0.1, then: Consequence = "warn") -> SentinelSpec:
    """The reward is earned in ways that don't carry over: the two newest held-out scores are both below the best one by more
    than `drop` of it, while the reward that the policy is trained on is above what it was then. Needs `evaluation.files`."""
    query = f"""
        with scored as (
            from updates
            select step, "eval/score" as score, coalesce(
                avg("reward/mean") over (order by step rows 4 preceding), lead("reward/mean") over (order by step)
            ) as reward
            qualify score is not null
        )
        select best.step as best_update, best.score as best_score, best.reward as reward_then,
            newest.step as update, newest.score, newest.reward
        from (from scored order by score desc, step limit 1) as best, (from scored order by step desc limit 2) as newest
        where newest.score < best.score - {drop} * abs(best.score) and newest.reward > best.reward
        qualify count(*) over () = 2 order by update"""
    return SentinelSpec(when=" ".join(query.split()), then=then, every=5, window=None)


def one_answer(share: float = 0.5, then: Consequence = "warn") -> SentinelSpec:
    """The policy says the same whatever it is asked: one response stands under more than `share` of the prompts of the newest
    5 updates, and under less than half as many of those 15 updates before."""
    query = f"""
        with said as (
            from rollouts select age < 5 as newest, response, count(distinct "row") as prompts, avg(reward) as reward
            where age < 5 or age >= 15 group by all
        ), asked as (
            from rollouts select age < 5 as newest, count(distinct "row") as prompts where age < 5 or age >= 15 group by all
        )
        select now.response, now.reward, now.prompts / (select prompts from asked where newest) as share,
            coalesce(before.prompts, 0) / (select prompts from asked where not newest) as share_before
        from said as now left join said as before on before.response = now.response and not before.newest
        where now.newest and share > {share} and share_before < share / 2"""
    return SentinelSpec(when=" ".join(query.split()), then=then, every=5)
