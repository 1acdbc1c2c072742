"""Which groups a report shows whole, and their responses token by token."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from asyncrl.replay.log.digest import RunDigest
from asyncrl.replay.log.reader import ReplayReader
from asyncrl.report.samples import DETAILS, RolloutSample, by_group, samples_of

_NEWEST, _SPREAD, _EXTREME, _FAILED = 8, 16, 6, 6  # groups
_TOKENS = 400  # of a response, and of a prompt four times as many characters
_ROLLOUTS = 16  # of a group

Pieces = Callable[[Sequence[int]], list[str]]


def picked_samples(reader: ReplayReader, digest: RunDigest, recipe: dict[str, Any], most_bytes: int) -> list[dict[str, Any]]:
    """Groups for the page's browser, as JSON of at most so many bytes. Those whose rows were deleted are missing."""
    reasons = picked_groups(digest)
    samples = samples_of(reader.rollouts(DETAILS, groups=[*reasons]))
    pieces = token_pieces(recipe.get("model", {}))
    found, size = [], 0
    groups = {own[0].group: own for own in by_group(samples)}
    for group, why in reasons.items():
        if group in groups:
            told = _group(groups[group], why, pieces)
            size += len(msgspec.json.encode(told))
            if size > most_bytes:
                break
            found.append(told)
    return found


def picked_groups(digest: RunDigest) -> dict[int, str]:
    """Groups and why they are shown: in turns of each reason, so that what is cut off is of all of them."""
    groups, place = np.unique(digest.scored_groups, return_inverse=True)
    trained = digest.updates_of(groups)
    count = np.maximum(1, np.bincount(place, minlength=len(groups)))
    mean = np.bincount(place, digest.rewards, len(groups)) / count
    spread = np.bincount(place, digest.rewards**2, len(groups)) / count - mean**2
    own = np.flatnonzero(trained >= 0)
    newest = own[np.argsort(trained[own], kind="stable")[::-1]]  # also among equals

    def largest(of: np.ndarray) -> list[int]:
        order: list[int] = groups[newest[np.argsort(-of[newest], kind="stable")]][:_EXTREME].tolist()
        return order

    def spread_out(of: np.ndarray, most: int) -> list[int]:
        chosen: list[int] = of[np.unique(np.linspace(0, len(of) - 1, min(most, len(of))).astype(int))].tolist()
        return chosen

    reasons = {
        "newest": groups[newest[:_NEWEST]].tolist(),
        "spread over the run": spread_out(groups[newest], _SPREAD),
        "widest spread": largest(spread),
        "highest reward": largest(mean),
        "lowest reward": largest(-mean),
        "failed": spread_out(digest.bad_groups, _FAILED),
    }
    found: dict[int, str] = {}
    for turn in range(max(map(len, reasons.values()))):
        for why, chosen in reasons.items():
            if turn < len(chosen):
                found.setdefault(chosen[turn], why)
    return found


def token_pieces(model: dict[str, Any]) -> Pieces | None:
    """What makes texts of tokens, one each; None where the model's tokenizer.json is not at hand. Downloads nothing."""
    name = model.get("tokenizer") or model.get("path", "")
    path: Any = Path(name) / "tokenizer.json"
    if not path.is_file():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            path = try_to_load_from_cache(name, "tokenizer.json")
        except HFValidationError:
            return None
        if not isinstance(path, str):
            return None
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    known: dict[tuple[int, int], str] = {}

    def text(before: int, token: int) -> str:
        if (before, token) not in known:  # blanks between words show only beside another token
            alone = tokenizer.decode([before], skip_special_tokens=False)
            both = tokenizer.decode([before, token], skip_special_tokens=False)
            own = tokenizer.decode([token], skip_special_tokens=False)
            known[before, token] = both[len(alone) :] if both.startswith(alone) else own
        return known[before, token]

    def pieces(tokens: Sequence[int]) -> list[str]:
        first = [tokenizer.decode(tokens[:1], skip_special_tokens=False)] if tokens else []
        return first + [text(before, token) for before, token in pairwise(tokens)]

    return pieces


def _group(samples: Sequence[RolloutSample], why: str, pieces: Pieces | None) -> dict[str, Any]:
    first = samples[0]
    return {
        "group": first.group,
        "why": why,
        "prompt": first.prompt[: 4 * _TOKENS],
        "truth": first.ground_truth[:_TOKENS],
        "source": first.data_source,
        "outcome": first.outcome,
        "update": first.trained_update,
        "rollouts": [_rollout(sample, pieces) for sample in samples[:_ROLLOUTS]],
    }


def _rollout(sample: RolloutSample, pieces: Pieces | None) -> dict[str, Any]:
    same = ("name", "baseline", "status", "reward", "gain", "lag", "length", "surprise", "parts")
    known = {name: getattr(sample, name) for name in same}
    context = np.flatnonzero(np.diff([0, *(not chosen for chosen in sample.chosen[:_TOKENS]), 0]))
    return {
        **{name: float(f"{value:.5g}") if isinstance(value, float) else value for name, value in known.items()},
        "update": sample.trained_update,
        "finish": sample.finish_reason,
        "error": sample.error[:_TOKENS],
        "said": {name: text[: 4 * _TOKENS] for name, text in sample.said.items()},
        "messages": [(message.role, message.content[:_TOKENS]) for message in sample.messages[:20]],
        "response": sample.response[: 8 * _TOKENS],
        "tokens": pieces(sample.token_ids[:_TOKENS]) if pieces else None,
        "cut": max(0, len(sample.token_ids) - _TOKENS),
        "logprobs": [float(f"{value:.4g}") for value in sample.logprobs[:_TOKENS]],
        "spans": [(span.start, min(span.end, _TOKENS), span.update) for span in sample.spans if span.start < _TOKENS],
        "context": context.reshape(-1, 2).tolist(),  # [from, to) of tokens that the policy did not choose
    }
