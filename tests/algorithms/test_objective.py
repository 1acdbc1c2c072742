"""The composed loss against a reference of its own, written token by token in float64."""

import math

import pytest
import torch

from asyncrl.algorithms.corrections import Columns
from asyncrl.algorithms.objective import AGGREGATIONS, loss_metrics, mean_weight, needs_proximal, objective
from asyncrl.config import AlgorithmSpec


def random_columns(tokens: int = 40) -> tuple[Columns, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)

    def draw() -> torch.Tensor:
        return -2 + torch.randn(tokens, dtype=torch.float64, generator=generator)

    coefficients, advantages, behaviour, shift, reference = draw().abs() / tokens, draw() + 2, draw(), draw() + 2, draw()
    columns = Columns(
        coefficients,
        advantages,
        behaviour,
        proximal_t=behaviour + 0.6 * shift,
        sequence_t=torch.arange(tokens) // 7,  # the last is short
        lag_t=torch.arange(tokens) % 4,
        reference_t=reference,
        kept_t=torch.arange(tokens) % 5 != 3,
    )
    logp = (columns.proximal_t + 0.3 * (draw() + 2)).requires_grad_()
    return columns, logp, draw().abs().requires_grad_()


def weight_and_old(spec: AlgorithmSpec, columns: Columns, logp: list[float], i: int) -> tuple[float, float]:
    """The correction's weight of token i, and the logprob that its ratio is taken to."""
    behaviour, proximal = columns.behaviour_t.tolist(), columns.proximal_t.tolist()
    own = [k for k, s in enumerate(columns.sequence_t.tolist()) if s == columns.sequence_t[i]]
    old = proximal[i]
    if spec.ratio_to == "behaviour":
        return 1.0, behaviour[i]
    if spec.correction == "decoupled_loglinear":
        lag = int(columns.lag_t[i])
        old = (behaviour[i] + lag * logp[i]) / (lag + 1)
    ratio = math.exp(old - behaviour[i])
    weight = {
        "decoupled": min(ratio, spec.behaviour_cap),
        "decoupled_loglinear": min(ratio, spec.behaviour_cap),
        "tis": min(ratio, spec.tis_cap),
        "tis_sequence": min(math.exp(sum(proximal[k] - behaviour[k] for k in own)), spec.tis_cap),
        "none": 1.0,
    }[spec.correction]
    return weight, old


def binary_kl(p: float, q: float) -> float:
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def stays(spec: AlgorithmSpec, columns: Columns, logp: list[float], i: int) -> bool:
    behaviour, proximal = columns.behaviour_t.tolist(), columns.proximal_t.tolist()
    delta = [new - old for new, old in zip(proximal, behaviour, strict=True)]
    own = [k for k, s in enumerate(columns.sequence_t.tolist()) if s == columns.sequence_t[i]]
    total, drift = sum(delta[k] for k in own), sum(behaviour[k] - logp[k] for k in own)
    p, q = (min(max(math.exp(x[i]), 1e-8), 1 - 1e-8) for x in (proximal, behaviour))
    mean, low, high = total / len(own), *spec.icepop_sequence_bounds
    return (
        ("icepop_sequence" not in spec.masks or low <= math.exp(total) <= high)
        and ("kpop" not in spec.masks or (binary_kl(p, q) <= spec.kpop_bound and binary_kl(q, p) <= spec.kpop_bound))
        and (
            "off_policy_sequence" not in spec.masks
            or not (columns.advantages_t[i] < 0 and drift / len(own) > spec.off_policy_sequence_bound)
        )
        and ("icepop" not in spec.masks or spec.icepop_bounds[0] <= math.exp(delta[i]) <= spec.icepop_bounds[1])
        and ("geometric" not in spec.masks or spec.geometric_bounds[0] <= math.exp(mean) <= spec.geometric_bounds[1])
        and (columns.kept_t is None or bool(columns.kept_t[i]))
    )


def by_token(
    spec: AlgorithmSpec, columns: Columns, logp: torch.Tensor, entropy: torch.Tensor, weight_mean: float = 1.0
) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    low, high = spec.setting("clip_ratio"), spec.setting("clip_ratio_high")
    for i, advantage in enumerate(columns.advantages_t.tolist()):
        weight, old = weight_and_old(spec, columns, logp.tolist(), i)
        if spec.policy_loss == "pg":
            policy = -logp[i] * advantage
        else:
            ratio = math.e ** (logp[i] - old)
            bounded = min(max(ratio.item(), 1 - low), 1 + high)
            surrogate = min(ratio.item() * advantage, bounded * advantage)
            policy = -ratio * advantage if surrogate == ratio.item() * advantage else logp.new_tensor(-surrogate)
        delta = logp[i] - columns.reference_t[i]
        tangent = math.exp(3) - 4 + (math.exp(3) - 1) * (-3 - delta)  # of k3 where it is too steep
        plain = torch.exp(-delta) - 1 + delta
        unbiased = torch.exp(logp[i] - columns.behaviour_t[i]) * plain
        kl = {"k2": delta**2 / 2, "k3": plain if delta > -3 else tangent, "k3_unbiased": unbiased}[spec.setting("kl_estimator")]
        policy = policy * weight / weight_mean * stays(spec, columns, logp.tolist(), i)
        total = total + columns.coefficients_t[i] * (policy + spec.kl_coef * kl - spec.entropy_coef * entropy[i])
    return total


MASKS = {"icepop_bounds": (0.7, 1.6), "geometric_bounds": (0.8, 1.3)}
CAPS = {"decoupled": {"behaviour_cap": 1.5}, "decoupled_loglinear": {"behaviour_cap": 1.5}}
CAPS |= {"tis": {"tis_cap": 1.2}, "tis_sequence": {"tis_cap": 1.2}, "none": {}}
NEW_MASKS = [("icepop_sequence", "bounds", (0.5, 3.0)), ("kpop", "bound", 0.05), ("off_policy_sequence", "bound", 0.01)]
SPECS = [
    AlgorithmSpec(kl_coef=0.1, entropy_coef=0.01),
    AlgorithmSpec(kl_coef=0.1, kl_estimator="k2", correction="none", clip_ratio_high=0.4),
    AlgorithmSpec(behaviour_cap=1.5),
    AlgorithmSpec(ratio_to="behaviour", correction="none"),
    *(
        AlgorithmSpec(
            correction=correction,
            policy_loss=loss,
            masks=masks,
            kl_coef=0.1,
            **CAPS[correction],
            **{f"{mask}_bounds": MASKS[f"{mask}_bounds"] for mask in masks},
        )
        for correction in CAPS
        for loss in ("ppo", "pg")
        for masks in ((), ("icepop",), ("geometric",), ("geometric", "icepop"))
    ),
    *(AlgorithmSpec(masks=(mask,), **{f"{mask}_{name}": bound}) for mask, name, bound in NEW_MASKS),
    AlgorithmSpec(masks=tuple(mask for mask, *_ in NEW_MASKS), **{f"{mask}_{name}": bound for mask, name, bound in NEW_MASKS}),
    AlgorithmSpec(correction="decoupled_loglinear", masks=("off_policy_sequence",), off_policy_sequence_bound=0.01),
    AlgorithmSpec(kl_coef=0.1, kl_estimator="k3_unbiased"),
    AlgorithmSpec(kl_coef=0.1, kl_estimator="k3_unbiased", ratio_to="behaviour", correction="none"),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.policy_loss}-{spec.correction}-{'+'.join(spec.masks)}")
@pytest.mark.parametrize("minibatch_mask", [False, True])
def test_value_and_gradient_equal_the_token_by_token_reference(spec: AlgorithmSpec, minibatch_mask: bool) -> None:
    columns, logp, entropy = random_columns()
    columns = columns if minibatch_mask else columns._replace(kept_t=None)
    loss, _, counted = objective(spec, columns, logp, entropy)
    expected = by_token(spec, columns, logp, entropy)
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=1e-12)
    found = torch.autograd.grad(loss, (logp, entropy), allow_unused=True, materialize_grads=True)
    wanted = torch.autograd.grad(expected, (logp, entropy), allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-12)
    assert counted.masked_t.tolist() == [not stays(spec, columns, logp.tolist(), i) for i in range(len(logp))]
    assert (counted.weights_t[counted.masked_t] == 0).all()
    if spec.masks:
        assert 0 < counted.masked_t.sum() < len(logp)


def sliced(columns: Columns, part: slice) -> Columns:
    return Columns(*(c[part] for c in columns))


@pytest.mark.parametrize("name", ["ppo", "gspo", "gmpo", "cispo", "dppo_tv", "dppo_kl", "sapo", "pg"])
def test_a_pack_split_between_sequences_has_the_same_loss(name: str) -> None:
    spec = AlgorithmSpec(
        policy_loss=name,
        correction="tis_sequence",
        masks=("icepop", "geometric", "icepop_sequence", "kpop", "off_policy_sequence"),
        kl_coef=0.1,
        kl_estimator="k3_unbiased",
        entropy_coef=0.01,
        **MASKS,
    )
    columns, logp, entropy = random_columns()
    whole = objective(spec, columns, logp, entropy)[0]
    parts = [objective(spec, sliced(columns, p), logp[p], entropy[p])[0] for p in (slice(14), slice(14, 40))]
    torch.testing.assert_close(sum(parts), whole, atol=1e-12, rtol=1e-12)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    shuffled = objective(spec, Columns(*(c[order] for c in columns)), logp[order], entropy[order])[0]
    torch.testing.assert_close(shuffled, whole, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("correction", ["decoupled", "tis", "tis_sequence"])
def test_weights_may_be_divided_by_their_mean_over_the_batch(correction: str) -> None:
    """Over tokens, or over sequences where all tokens of one share a weight, masked or not; and nothing else changes."""
    columns, logp, entropy = random_columns()
    spec = AlgorithmSpec(correction=correction, normalize_weights=True, masks=("icepop",), kl_coef=0.1, entropy_coef=0.01)
    weights = [weight_and_old(spec, columns, logp.tolist(), i)[0] for i in range(len(logp))]
    if correction == "tis_sequence":
        weights = weights[::7]  # one of each sequence
    expected = sum(weights) / len(weights)
    counts = columns.sequence_t.bincount().double()
    found = mean_weight(spec, columns.proximal_t, columns.behaviour_t, columns.sequence_t, counts)
    assert found == pytest.approx(expected)
    loss = objective(spec, columns, logp, entropy, weight_mean=found)[0]
    torch.testing.assert_close(loss, by_token(spec, columns, logp, entropy, expected), atol=1e-12, rtol=1e-12)
    share = AGGREGATIONS["seq-mean-token-mean" if correction == "tis_sequence" else "token-mean"](spec, counts)
    unmasked = objective(AlgorithmSpec(correction=correction), columns._replace(kept_t=None), logp, entropy, weight_mean=found)[
        2
    ]
    assert float((share[columns.sequence_t] * unmasked.weights_t).sum()) == pytest.approx(1.0)


def test_the_coefficient_of_the_kl_may_come_from_outside() -> None:
    columns, logp, entropy = random_columns()
    expected = objective(AlgorithmSpec(kl_coef=0.3), columns, logp, entropy)[0]
    torch.testing.assert_close(objective(AlgorithmSpec(kl_coef=0.1), columns, logp, entropy, 0.3)[0], expected)


def test_what_needs_the_policy_at_the_start_of_the_update() -> None:
    assert needs_proximal(AlgorithmSpec())
    assert needs_proximal(AlgorithmSpec(correction="none"))
    assert not needs_proximal(AlgorithmSpec(correction="decoupled_loglinear"))
    assert not needs_proximal(AlgorithmSpec(correction="none", ratio_to="behaviour"))
    assert needs_proximal(AlgorithmSpec(correction="none", ratio_to="behaviour", masks=("icepop",)))
    assert not needs_proximal(AlgorithmSpec(correction="decoupled_loglinear", masks=("off_policy_sequence",)))
    for spec in (AlgorithmSpec(correction="decoupled_loglinear"), AlgorithmSpec(correction="none", ratio_to="behaviour")):
        columns, logp, entropy = random_columns()
        columns = columns._replace(proximal_t=torch.full_like(logp, math.nan), kept_t=None)
        assert objective(spec, columns, logp, entropy)[0].isfinite()


def test_metrics_by_hand() -> None:
    values = [torch.tensor(v) for v in ([0.5, 0.5], [1.0, 1.0], [-1.0, -1.0 - math.log(9)], [-1.0, -1.0], [0, 0], [0, 1])]
    logp = torch.tensor([-1.0, -1.0 + math.log(2)])
    _, sums, counted = objective(AlgorithmSpec(), Columns(*values), logp, torch.tensor([0.2, 0.4]))
    found = loss_metrics({**{k: float(v) for k, v in sums.items()}, "grad_norm": 3.0}, 1)
    assert found["actor/pg_loss"] == pytest.approx(0.5 * -1.0 + 0.5 * 5 * -1.2)  # second: weight 9 capped at 5, ratio 2 at 1.2
    assert found["actor/entropy"] == pytest.approx(0.3)
    assert found["actor/ppo_kl"] == pytest.approx(-math.log(2) / 2)
    assert found["actor/pg_clipfrac"] == 0.5
    assert found["actor/grad_norm"] == 3.0
    assert counted.weights_t.tolist() == pytest.approx([1.0, 5.0])
    assert counted.capped_t.tolist() == [False, True]
    assert loss_metrics({}, 0) == {}


# ------------------------------------------------------------------------------------------- aggregate

LOSSES = [[1.0, 2.0, 3.0], [10.0]]  # two sequences, 3 and 1 trained tokens


@pytest.mark.parametrize(
    ("name", "scale", "expected"),
    [
        ("token-mean", None, 16 / 4),
        ("token-sum", None, 16),
        ("seq-mean-token-sum", None, (6 + 10) / 2),
        ("seq-mean-token-mean", None, (2 + 10) / 2),
        ("seq-mean-token-sum-norm", 8, (6 / 8 + 10 / 8) / 2),
    ],
)
def test_by_hand(name: str, scale: int | None, expected: float) -> None:
    spec = AlgorithmSpec(loss_agg=name, loss_scale_factor=scale)
    coefficients = AGGREGATIONS[name](spec, torch.tensor([3.0, 1.0])).tolist()
    assert sum(c * sum(values) for c, values in zip(coefficients, LOSSES, strict=True)) == pytest.approx(expected)
