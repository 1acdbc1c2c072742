"""Reward shaping: penalties for a training rollout's length and its repetitions, and the bounds of the result. Pure.

Lengths are tokens of the response, its stop token included. Normalization is not done here: within a group it is the
estimator's, and a running one would give one rollout different rewards on two workers.
"""

from collections.abc import Sequence

from asyncrl.config import ShapingSpec


def shape(reward: float, response_ids: Sequence[int], spec: ShapingSpec, max_length: int) -> tuple[float, dict[str, float]]:
    """The shaped reward, and parts to log: what each penalty that is on added, and the reward before (`unshaped`).

    Clipping comes last, on the sum.
    """
    if spec == ShapingSpec():
        return reward, {}
    length, added = len(response_ids), dict[str, float]()
    if spec.overlong_buffer:
        punished = overlong(length, max_length=max_length, buffer=spec.overlong_buffer)
        added["overlong_penalty"] = spec.overlong_penalty * punished
    if spec.length_penalty:
        added["length_penalty"] = -spec.length_penalty * length / max_length
    if spec.repetition_penalty:
        added["repetition_penalty"] = -spec.repetition_penalty * repetition(response_ids, spec.repetition_ngram)
    total = reward + sum(added.values())
    if spec.clip is not None:
        total = min(max(total, spec.clip[0]), spec.clip[1])
    return total, {"unshaped": reward, **added}


def overlong(length: int, *, max_length: int, buffer: int) -> float:
    """Soft overlong punishment (DAPO, Yu et al. 2025, eq. 13): 0 up to max_length − buffer, then linear to −1 at max_length.

    DAPO: max_length 20,480 with a buffer of 4,096.
    """
    return -min(max(length - (max_length - buffer), 0) / buffer, 1.0)


def repetition(ids: Sequence[int], ngram: int) -> float:
    """The share of n-grams that stood in the response before, in [0, 1): 1 − distinct / all; 0 where there is none.

    The repetition reward of Open R1 (huggingface/open-r1, `get_repetition_penalty_reward`; after Yeo et al. 2025,
    "Demystifying Long Chain-of-Thought Reasoning in LLMs"), on tokens instead of words.
    """
    count = len(ids) - ngram + 1
    if count < 1:
        return 0.0
    return 1.0 - len({tuple(ids[start : start + ngram]) for start in range(count)}) / count
