"""Which knob to turn: a run's waits and lags, judged by stated rules. Pure."""

from collections.abc import Mapping, Sequence

import numpy as np
from msgspec import Struct

from asyncrl.report.run_tables import ReadRun, actor_states
from asyncrl.report.series import column

_BUSY, _WAITS, _LIMITS, _MASKED = 0.85, 0.15, 0.05, 0.01  # shares


class Advice(Struct, frozen=True, kw_only=True):
    """What a rule found. `knob` is a setting, or empty."""

    found: str
    rule: str  # when it is said
    knob: str = ""


class Standing(Struct, frozen=True, kw_only=True):
    """Shares of time and means over the second half of a run; NaN: not known."""

    busy: Mapping[str, float] = {}  # by role: computing, or taking weights
    waits: Mapping[str, float] = {}  # by role: for the store
    limits: Mapping[str, float] = {}  # of the store's time: reserve_ahead, max_lag, stragglers
    flight: float = float("nan")  # updates that a trained token was in flight, and in the queue
    queue: float = float("nan")
    masked: float = 0.0  # of the policy's tokens, those too old to train


def standing(facts: ReadRun) -> Standing:
    """How the second half of the run went."""
    lines = facts.metrics.actors
    half, seconds = len(lines) // 2, actor_states(lines)
    busy: dict[str, list[float]] = {}
    waits: dict[str, list[float]] = {}
    for actor, states in seconds.items():
        spent = {state: float(of[half:].sum()) for state, of in states.items()}
        whole, role = sum(spent.values()) or 1.0, actor.rstrip("0123456789").rstrip("-")
        busy.setdefault(role, []).append((spent.get("busy", 0.0) + spent.get("sync", 0.0)) / whole)
        waits.setdefault(role, []).append(spent.get("wait:store", 0.0) / whole)
    late = facts.split_updates.size // 2
    masked = column(facts.metrics.steps[len(facts.metrics.steps) // 2 :], "staleness/masked_share")
    prefix = "store/limit/"
    return Standing(
        busy={role: float(np.mean(shares)) for role, shares in busy.items()},
        waits={role: float(np.mean(shares)) for role, shares in waits.items()},
        limits={name.removeprefix(prefix): v for name, v in lines[-1].items() if name.startswith(prefix)} if lines else {},
        flight=float(np.mean(facts.split_flight[late:])) if facts.split_updates.size else float("nan"),
        queue=float(np.mean(facts.split_queue[late:])) if facts.split_updates.size else float("nan"),
        masked=float(np.nanmean(masked)) if np.isfinite(masked).any() else 0.0,
    )


def advice(now: Standing) -> list[Advice]:
    """What the rules say, the bottleneck first. Empty where too little is known."""
    return [*_bottleneck(now), *_lags(now)]


def _bottleneck(now: Standing) -> Sequence[Advice]:
    if not {"learner", "generator"} <= now.busy.keys():
        return ()
    learner, generators = now.busy["learner"], now.busy["generator"]
    idle, room = now.waits["learner"], now.waits["generator"]
    said = f"the learner computes or sends weights {learner:.0%} of the time and waits for the store {idle:.0%}; "
    said += f"generators compute or take weights {generators:.0%} and wait for it {room:.0%}"
    if learner >= _BUSY:
        found = f"The learner limits: {said}. More generators would only make tokens staler."
        return (Advice(found=found, knob="deploy.learner (more ranks, a faster device)", rule=f"learner busy ≥ {_BUSY:.0%}"),)
    if idle < _WAITS:
        return (Advice(found=f"Balanced: {said}.", rule=f"learner busy < {_BUSY:.0%}, waiting for the store < {_WAITS:.0%}"),)
    held = now.limits.get("stragglers", 0.0)
    if held >= _WAITS:
        found = f"Stragglers limit: {said}. A full batch was held back {held:.0%} of the time, for responses else too late."
        rule = f"learner waits for the store ≥ {_WAITS:.0%}, stragglers held batches back ≥ {_WAITS:.0%} of the time so far"
        return (Advice(found=found, knob="staleness.max_lag (up)", rule=rule),)
    if room < _WAITS:
        rule = f"learner waits for the store ≥ {_WAITS:.0%}, generators < {_WAITS:.0%}"
        knob = "deploy.generators.count, or deploy.generators.engine.slots"
        return (Advice(found=f"Generation limits: {said}.", knob=knob, rule=rule),)
    limit = max(now.limits, key=lambda name: now.limits[name], default="")
    rule = f"both wait for the store ≥ {_WAITS:.0%}; named is the store's largest limit, if ≥ {_LIMITS:.0%} of its time so far"
    if not limit or now.limits[limit] < _LIMITS:
        found = f"Both sides wait: {said}. No bound holds them up: look at the rewards, and at responses of unequal length."
        return (Advice(found=found, knob="deploy.rewards", rule=rule),)
    found = f"Both sides wait: {said}. {limit} held generators up {now.limits[limit]:.0%} of the time."
    return (Advice(found=found, knob=f"staleness.{limit} (up)", rule=rule),)


def _lags(now: Standing) -> Sequence[Advice]:
    found = []
    if now.flight + now.queue >= 0.5:  # not where one is NaN
        parts = f"A trained token was {now.flight:.2f} updates in flight and {now.queue:.2f} in the queue on average."
        if now.queue > now.flight and now.limits.get("stragglers", 0.0) >= _WAITS:
            text = f"{parts} Most of its lag is waiting to be trained, behind stragglers."
            found.append(Advice(found=text, rule="lag ≥ 0.5, queue > flight, batches held back"))
        elif now.queue > now.flight:
            text = f"{parts} Most of its lag is waiting to be trained: fewer batches ahead make it fresher."
            found.append(Advice(found=text, knob="staleness.reserve_ahead (down)", rule="lag ≥ 0.5, queue > flight"))
        else:
            text = (
                f"{parts} Most of its lag is generation: faster engines or shorter responses make it fresher, the queue won't."
            )
            knob = "deploy.generators.count (up), sampling.max_response_length (down)"
            found.append(Advice(found=text, knob=knob, rule="lag ≥ 0.5, flight ≥ queue"))
    if now.masked > _MASKED:
        text = f"{now.masked:.1%} of the policy's tokens were too old to train."
        found.append(Advice(found=text, knob="staleness.max_lag (up)", rule=f"masked share > {_MASKED:.0%}"))
    return found
