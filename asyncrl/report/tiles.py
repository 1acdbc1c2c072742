"""What a run came to, in a few figures for people. Pure."""

import numpy as np

from asyncrl.report.run_tables import ReadRun, actor_states
from asyncrl.report.series import column


def run_tiles(facts: ReadRun) -> list[tuple[str, str]]:
    """Name and value of each; those that nothing is known of are left out."""
    steps, evals = facts.metrics.steps, facts.metrics.evals
    made = int(facts.commit_updates[-1]) if len(facts.commit_updates) else 0
    seconds = float(facts.commit_times[-1] - facts.began) if made else 0.0
    learner = {state: float(of.sum()) for state, of in actor_states(facts.metrics.actors).get("learner", {}).items()}
    working = sum(of for state, of in learner.items() if state != "wait:start")
    lags, tokens = column(steps, "staleness/lag_mean"), column(steps, "tokens/trained")
    found = [
        ("updates", str(made)),
        ("samples", f"{np.nansum(column(steps, 'samples')):,.0f}" if steps else ""),
        (
            "time",
            f"{seconds / 3600:.1f} h"
            if seconds >= 7200
            else f"{seconds / 60:.1f} min"
            if seconds >= 120
            else f"{seconds:.0f} s",
        ),
        ("held-out score", _from_to(column(evals, "eval/score"))),
        ("reward", _from_to(facts.reward_means_by_update())),
        ("mean lag", f"{np.nansum(lags * tokens) / np.nansum(tokens):.2f}" if np.isfinite(lags * tokens).any() else ""),
        ("largest lag", f"{np.nanmax(column(steps, 'staleness/lag_max')):.0f}" if np.isfinite(lags).any() else ""),
        ("learner busy", f"{learner.get('busy', 0.0) / working:.0%}" if working else ""),
        ("restarts", str(sum(kind == "restart" for _, kind, _ in facts.marks))),
        *((name, str(len(times))) for name, times in facts.lost.items() if len(times)),
    ]
    return [(name, value) for name, value in found if value]


def _from_to(values: np.ndarray) -> str:
    known = values[np.isfinite(values)]
    return f"{known[0]:.3g} → {known[-1]:.3g}" if len(known) else ""
