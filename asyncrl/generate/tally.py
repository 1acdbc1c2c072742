"""The generator's counters. Not thread-safe; they never go down, except `pause_s_last`. swapped_at: seconds since the epoch."""

import time

from asyncrl.types import SwapReport


class Tally:
    """Tokens, rollouts, swaps, and how often the store gave nothing, by its reason."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._gauges = dict.fromkeys(
            (
                *("tokens", "rollouts", "swaps", "pause_s_total", "pause_s_last", "pause_s_max"),
                *("recomputed_tokens", "discarded_tokens", "evals_left"),
            ),
            0.0,
        )

    def start(self) -> None:
        """Rates count from here."""
        self._since = time.monotonic()

    def rollout(self, tokens: int) -> None:
        """One rollout for the store."""
        self._gauges["rollouts"] += 1
        self._gauges["tokens"] += tokens

    def swap(self, report: SwapReport) -> None:
        self._gauges["swaps"] += 1
        self._gauges["recomputed_tokens"] += report.recomputed_tokens
        self._gauges["discarded_tokens"] += report.discarded_tokens
        self._gauges["swapped_at"] = time.time()
        self._gauges["pause_s_last"] = report.pause_s
        self._gauges["pause_s_total"] += report.pause_s
        self._gauges["pause_s_max"] = max(self._gauges["pause_s_max"], report.pause_s)

    def waited(self, reason: str) -> None:
        """The store had no ticket."""
        if reason:
            key = "waits/" + reason.replace(" ", "_")
            self._gauges[key] = self._gauges.get(key, 0.0) + 1

    def eval_left(self) -> None:
        """An eval ticket for a version that is no longer loaded."""
        self._gauges["evals_left"] += 1

    def gauges(self) -> dict[str, float]:
        seconds = max(time.monotonic() - self._since, 1e-9)
        return {**self._gauges, "tokens_per_s": self._gauges["tokens"] / seconds}
