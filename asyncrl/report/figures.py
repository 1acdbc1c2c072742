"""Which plots a page has: those of its runs for which there is anything. Pure."""

import re
from collections.abc import Sequence
from typing import Any

PER_LAG = re.compile(r".*[_/]lag_\d+")

_Series = tuple[str, str, str]  # table, names (a pattern), and what they are called; "": as they are

# By section: title, what to know of it, series.
_FIGURES: dict[str, list[tuple[str, str, list[_Series]]]] = {
    "Learning": [
        ("Reward", "mean of the trained rollouts, 95% interval over prompts", [("rewards", "reward", "reward")]),
        ("Held-out score", "95% interval (Wilson's, a draw per prompt)", [("evals", "eval/score.*", "")]),
        ("Response length", "tokens of the policy", [("steps", "response_length/(mean|max|min)", "")]),
        ("Responses cut at the limit", "share", [("steps", "response_length/clip_ratio", "cut")]),
        ("Entropy", "nats per token", [("steps", "actor/entropy", "entropy")]),
        ("Policy KL", "nats per token", [("steps", r"actor/(ppo_kl\w*|kl\w*|reward_kl_penalty)|objective/kl", "")]),
        ("Advantages", "of the trained tokens", [("steps", "critic/advantages/(mean|std|min|max)", "")]),
        ("Groups of equal rewards", "share; there is nothing to compare in them", [("steps", "frac_reward_zero_std", "share")]),
        ("Clip share", "of the trained tokens", [("steps", r"actor/\w*clip\w*|clip_ratio/\w+", "")]),
        ("Ratio", "policy to old", [("steps", r"actor/ratio/\w+", "")]),
        ("Gradient norm", "before clipping", [("steps", r"\w+/grad_norm", "")]),
        ("Effective sample size", "share of tokens that the correction leaves", [("steps", "correction/ess", "ESS")]),
        ("Correction", "share of weights cut or masked", [("steps", "correction/(cap|masked)_share", "")]),
        ("Engine–learner gap", "nats, at lag 0: engine error alone", [("steps", "gap/logprob.*", "")]),
        ("Behaviour to proximal KL", "nats: engine error and staleness", [("steps", "gap/k3", "k3")]),
    ],
    "Staleness": [
        (
            "In flight and in queue",
            "updates, mean over trained tokens",
            [("split", "flight", "in flight"), ("split", "queue", "in queue")],
        ),
        ("Lag", "updates", [("steps", "staleness/lag_(mean|max)", "")]),
        ("Masked", "share of the policy's tokens that were too old", [("steps", "staleness/masked.*", "")]),
    ],
    "Throughput": [
        ("Samples per second", "trained", [("steps", "rate/samples_per_s", "samples/s")]),
        ("Tokens per second", "trained", [("steps", "rate/tokens_per_s", "trained")]),
        ("MFU", "model FLOPs over the device's peak", [("steps", r"perf/mfu/\w+", "")]),
        ("Generated per second", "tokens, by generator", [("gauges", ".*/tokens_per_s", "")]),
        ("Seconds of an update", "", [("steps", r"timing_s/.*", "")]),
        ("In the store", "groups in flight and ready; rollouts unscored", [("gauges", "store/store/.*", "")]),
        ("What held up generators", "share of the store's time so far", [("gauges", "store/limit/.*", "")]),
    ],
    "Trouble": [("Lost", "groups evicted, failed or filtered; rollouts invalid or late", [("lost", ".*", "")])],
}


def page_figures(runs: Sequence[dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """runs: the tables of each. Figures in the order of the page, each with its series as (table, column, label); what no named
    figure shows is in the section `All other metrics`, a figure per metric."""
    there: dict[str, dict[str, None]] = {}
    for tables in runs:
        for table, content in tables.items():
            there.setdefault(table, {}).update(dict.fromkeys(content["columns"]))
    found, shown = [], set()
    for section, (title, note, wanted) in [(section, one) for section, all_of in _FIGURES.items() for one in all_of]:
        series = [
            (table, name, label or name.rpartition("/")[2])
            for table, pattern, label in wanted
            for name in there.get(table, ())
            if re.fullmatch(pattern, name)
        ]
        shown |= {(table, name) for table, name, _ in series}
        if series:
            found.append({"section": section, "title": title, "note": note, "kind": "lines", "series": series})
    for table, columns in there.items():
        if table.startswith("waits/"):
            series = [(table, state, state) for state in columns]
            found.append({"section": "Who waits for whom", "title": table[6:], "note": "", "kind": "stack", "series": series})
    rest = [("steps", name) for name in there.get("steps", ()) if ("steps", name) not in shown]
    rest += [("evals", name) for name in there.get("evals", ()) if ("evals", name) not in shown]
    for table, name in rest:
        section = "By lag" if PER_LAG.fullmatch(name) else "All other metrics"
        series = [(table, name, name)]
        found.append({"section": section, "title": name, "note": "", "kind": "lines", "series": series})
    return found


def settings_table(settings: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line per setting that any of the runs has: its name, the value in each (null: it has none), and whether they differ."""
    lines = []
    for name in sorted({name for of in settings for name in of}):
        values = [of.get(name) for of in settings]
        lines.append({"name": name, "values": values, "differs": any(value != values[0] for value in values)})
    return lines


def flattened(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name."""
    if not isinstance(settings, dict) or not settings:
        return {prefix: settings}
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= flattened(value, f"{prefix}.{name}" if prefix else str(name))
    return found
