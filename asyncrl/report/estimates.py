"""Means and shares with 95% confidence intervals. Pure."""

import math
from collections.abc import Sequence

from msgspec import Struct

Z95 = 1.959963984540054  # the 97.5% quantile of the normal distribution


class Estimate(Struct, frozen=True, kw_only=True):
    """A mean over prompts and its 95% confidence interval; the bounds are None for a single prompt."""

    mean: float
    low: float | None
    high: float | None


def estimate(values: Sequence[float]) -> Estimate:
    """values: one per prompt, an unbiased estimate made from its own responses.

    The prompts are the sample; the responses to one prompt are correlated and count as a cluster. With equally many each, the
    clustered standard error is that of the per-prompt values: s / sqrt(P), with s unbiased (Miller 2024, "Adding Error Bars to
    Evals", arXiv 2411.00640, sections 2.1 and 2.2). Values in [0, 1], which shares are, get Wilson's interval at the effective
    sample size that this error means, n = mean·(1 − mean) / (s² / P) (Franco et al. 2019, "Comparative Study of Confidence
    Intervals for Proportions in Complex Sample Surveys", doi 10.1093/jssam/smy019): it holds the mean, stays in [0, 1], and
    where all prompts agree, which says nothing of the error, n is P. Other scores get the normal approximation, which is too
    narrow below some 30 prompts, and has no width where all agree.
    """
    count = len(values)
    mean = min(max(math.fsum(values) / count, min(values)), max(values))  # rounding may not move it past them
    if count < 2:
        return Estimate(mean=mean, low=None, high=None)
    error = math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count
    if min(values) < 0 or max(values) > 1:
        half = Z95 * math.sqrt(error)
        return Estimate(mean=mean, low=mean - half, high=mean + half)
    spread = mean * (1 - mean)  # of a single draw
    low, high = wilson(mean, spread / error if error and spread else count)
    return Estimate(mean=mean, low=low, high=high)


def wilson(share: float, draws: float) -> tuple[float, float]:
    """The bounds between which a true share p is not refuted by `share` of so many draws, at 95%: |share − p| <= z·√(p(1−p)/n)
    (Wilson 1927, "Probable Inference, the Law of Succession, and Statistical Inference")."""
    squared = Z95 * Z95 / draws
    middle = (share + squared / 2) / (1 + squared)
    half = math.sqrt(share * (1 - share) * squared + squared * squared / 4) / (1 + squared)
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))  # as far as rounding goes
