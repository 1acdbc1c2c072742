"""Whole updates by several ranks, over real process groups: who computes what may not change them.

Compared are gradients, as they were when the optimizer stepped, and metrics, with those of one rank that has a pack for every
minibatch. Several algorithms at a time: to start a group is what takes long.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from torch.distributed.tensor import DTensor

from asyncrl.config import AlgorithmSpec, CriticSpec, Layout, LearnerSpec, OptimizerSpec, PrecisionSpec
from asyncrl.errors import NonFinite
from asyncrl.learn.critic import Critic
from asyncrl.learn.sft import SupervisedTrainer, fit
from asyncrl.learn.trainer import PolicyTrainer
from asyncrl.learn.update import RefusedSteps
from asyncrl.models.packed import PackedModel, TokenSequence
from asyncrl.models.ranks import Ranks
from asyncrl.models.sharding import shard
from asyncrl.models.value import OwnValues, SharedValues, value_model
from asyncrl.staleness import Staleness
from asyncrl.types import TrainRollout

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}  # that two ranks can divide
ROUNDING = 1e-5  # of a tensor's largest: 2e-6 on CPUs with AVX2, a little more where sums are made in wider registers
GENTLE = {"lr": 0.003, "eps": 1.0}  # so that AdamW's step is nearly the gradient's own, and blows up no difference of rounding
PRICED = {"adv_estimator": "gae", "gamma": 0.9, "lam": 0.7, "kl_coef": 0.2, "kl_in": "reward", "kl_estimator": "k1"}


MakeModel = Callable[..., Any]  # tiny_model of conftest.py


class Case(NamedTuple):
    """One algorithm, to be trained for an update of two minibatches: the second step is made by a policy that has moved."""

    algorithm: dict[str, Any]
    critic: dict[str, Any] | None = None
    tied: bool = True


class Made(NamedTuple):
    gradients: dict[str, list[dict[str, torch.Tensor]]]  # by model: whole, of each optimizer step, by name
    metrics: dict[str, float]
    state: dict[str, float]


CRITICS = {
    "own critic": Case({**PRICED, "bootstrap_truncated": True}, {"value_clip": 0.05, "ppo_epochs": 2}, tied=False),
    "shared critic": Case(PRICED, {"backbone": "shared", "value_coef": 0.5, "value_clip": 0.05}),
    "entropy, KL and clip": Case({"entropy_coef": 0.05, "kl_coef": 0.2}, tied=False),
}


@pytest.fixture(scope="module")
def cases(script: Callable[[Path], Any]) -> dict[str, Case]:
    """Every loss of the composed tests, and what has more than one model."""
    composed = script(Path(__file__).with_name("test_composed_updates.py"))
    found = {}
    for name, algorithm in composed.ALGORITHMS.items():
        bounds = [composed.WIDE[mask] for mask in algorithm.get("masks", ())]
        found[name] = Case({key: value for part in (algorithm, *bounds) for key, value in part.items()})
    return found | CRITICS


def keep_gradients(module: torch.nn.Module, optimizer: torch.optim.Optimizer, into: list[dict[str, torch.Tensor]]) -> None:
    def keep(*_: object) -> None:
        grads = {name: parameter.grad for name, parameter in module.named_parameters()}
        into.append({name: (g.full_tensor() if isinstance(g, DTensor) else g).clone() for name, g in grads.items()})

    optimizer.register_step_pre_hook(keep)


def trainer_of(ranks: Ranks, case: Case, make_model: MakeModel, folder: Path, **learner: Any) -> PolicyTrainer:
    def model(seed: int) -> Any:
        return make_model(seed, 2.0, hidden_size=32, **HEADS, tie_word_embeddings=case.tied)

    policy, reference, values, critic = model(0), model(3), None, None
    if ranks.holds("learner"):
        shard(policy, ranks, PrecisionSpec())
    if ranks.holds("reference"):
        shard(reference, ranks, PrecisionSpec())
    if case.critic is not None:
        spec = CriticSpec(**{**GENTLE, **case.critic})
        if spec.backbone == "shared":
            values = SharedValues(policy, ranks)
        elif ranks.holds("critic"):
            value = value_model(model(7))
            torch.nn.init.normal_(value.get_output_embeddings().weight, std=0.3)
            shard(value, ranks, PrecisionSpec())
            values = OwnValues(value, ranks)
        critic = Critic(values, spec, RefusedSteps(folder / "critic", 3, ranks.leads), total_steps=20)
    return PolicyTrainer(
        PackedModel(policy, 0.8, ranks) if ranks.holds("learner") else None,
        LearnerSpec(**{"batch_groups": 4, **GENTLE, "mini_batch_groups": 2, **learner}),
        AlgorithmSpec(**case.algorithm),
        Staleness(max_lag=2, batch_groups=4),
        total_steps=20,
        refused_dir=folder,
        reference=PackedModel(reference, 0.8, ranks) if ranks.holds("reference") else None,
        critic=critic,
    )


def updates(
    ranks: Ranks,
    cases: Mapping[str, Case],
    make_model: MakeModel,
    rollouts: list[TrainRollout],
    folder: Path,
    pack: int,
) -> dict[str, Made]:
    """One update of each case, in packs of at most so many tokens."""
    made = {}
    for name, case in cases.items():
        trainer = trainer_of(ranks, case, make_model, folder, max_tokens_per_pack=pack)
        gradients: dict[str, list[dict[str, torch.Tensor]]] = {model: [] for model in trainer.trained}
        for model, optimization in trainer.trained.items():
            keep_gradients(optimization.module, optimization.adamw, gradients[model])
        made[name] = Made(gradients, trainer.update(rollouts, 2), trainer.state)
    return made


ALONE: dict[str, Made] = {}


@pytest.fixture
def alone(cases: dict[str, Case], make_model, awkward, tmp_path: Path) -> dict[str, Made]:
    """What one rank makes of all cases, in one pack for every minibatch."""
    if not ALONE:
        ALONE.update(updates(Ranks(), cases, make_model, awkward, tmp_path, 16384))
    return ALONE


def assert_same(found: Made, expected: Made, name: str) -> None:
    assert found.gradients.keys() == expected.gradients.keys(), name
    for model, steps in expected.gradients.items():
        for step, (one, other) in enumerate(zip(found.gradients[model], steps, strict=True)):
            assert one.keys() == other.keys()
            apart = {key: ((one[key] - other[key]).abs().max() / other[key].abs().max().clamp(1e-30)).item() for key in other}
            worst = max(apart, key=lambda key: apart[key])
            assert apart[worst] <= ROUNDING, f"{name}, {model}, step {step}, {worst}"
    figures, same = (
        {key for key in made.metrics if not key.startswith(("timing_s/", "perf/max_"))}  # what a rank does is not what all do
        for made in (expected, found)
    )
    assert same == figures
    counts = {key for key in figures if expected.metrics[key].is_integer()}
    assert {key: found.metrics[key] for key in counts} == {key: expected.metrics[key] for key in counts}, name
    for key in figures - counts:
        within = 1e-5 if key.endswith(("/max", "/min")) else 1e-6  # of one token, whose rounding nothing averages
        assert found.metrics[key] == pytest.approx(expected.metrics[key], rel=within, abs=within), f"{name}: {key}"


@pytest.mark.slow
def test_updates_of_two_ranks_in_many_packs_are_those_of_one_in_one(gang, alone, cases, make_model, awkward, tmp_path) -> None:
    """Each of which is dealt up to four packs of nine tokens, or a dummy in place of one."""
    for of_rank in gang(Layout(shard=2), updates, cases, make_model, awkward, tmp_path, 9):
        for name in cases:
            assert_same(of_rank[name], alone[name], name)


# Here all ranks of a share make the same loss: one that couples the tokens of a sequence, those of a minibatch, and all models.
COUPLED = ["gspo", "deepseek", "sapo", "dpo, all pairs", *CRITICS]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "names"), [(Layout(sp=2), COUPLED), (Layout(tp=2), COUPLED), (Layout(shard=2, tp=2), ["deepseek", "own critic"])]
)
def test_ranks_that_share_packs_make_the_updates_of_one(
    layout: Layout, names: list[str], gang, alone, cases, make_model, awkward, tmp_path
) -> None:
    chosen = {name: cases[name] for name in names}
    for of_rank in gang(layout, updates, chosen, make_model, awkward, tmp_path, 30):
        for name in chosen:
            assert_same(of_rank[name], alone[name], name)


APART = {
    "own critic": CRITICS["own critic"],
    "adaptive KL": Case(
        {**PRICED, "kl_control": "adaptive", "kl_target": 0.1, "reward_normalization": "running"}, {"critic_warmup": 0}
    ),
    "KL in the loss": Case({"adv_estimator": "gae", "kl_coef": 0.2, "kl_control": "adaptive", "kl_target": 0.1}, {}),
    "the critic warms up": Case(PRICED, {"critic_warmup": 5, "value_clip": 0.05}),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "layouts",
    [
        {"learner": Layout(), "critic": Layout(), "reference": Layout()},
        {"learner": Layout(shard=2), "reference": Layout(), "critic": Layout(sp=2)},
        {"learner": Layout(), "critic": Layout(shard=2)},
    ],
)
def test_models_with_ranks_of_their_own_make_the_updates_of_one(
    layouts: dict, gang, make_model, awkward, tmp_path: Path
) -> None:
    """What is kept between updates is the same on all; figures are whole where the policy is."""
    found = gang(layouts, updates, APART, make_model, awkward, tmp_path, 12)
    for name, expected in updates(Ranks(), APART, make_model, awkward, tmp_path, 16384).items():
        rank = 0
        for group, layout in layouts.items():
            own = {"learner": {"policy", *({"critic"} - layouts.keys())}}.get(group, {group})
            gradients = {model: steps for model, steps in expected.gradients.items() if model in own}
            for of_rank in found[rank : rank + layout.ranks]:
                made = of_rank[name] if group == "learner" else of_rank[name]._replace(metrics=expected.metrics)
                assert_same(made, expected._replace(gradients=gradients), f"{name}, rank {rank} of {group}")
                assert of_rank[name].state == found[0][name].state == pytest.approx(expected.state, rel=1e-6)
            rank += layout.ranks


# Takes the last sequence's number: it must never see a pack without a token. broken: makes one sequence's loss not a number.
OWN_LOSS = """
def loss(logp_t, old_t, advantages_t, sequence_t):
    broken_t = (sequence_t == 0) & (sequence_t.max() >= 0) & {broken}
    return (-advantages_t * logp_t).masked_fill(broken_t, float("nan")), {{"last": sequence_t.double()}}
"""


def test_a_rank_without_a_pack_makes_every_pass_of_those_that_have_one(gang, make_model, awkward, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN_LOSS.format(broken=False))
    own = Case({"policy_loss": f"{tmp_path}/own.py:loss", "adv_estimator": "reinforce_plus_plus", "kl_coef": 0.1})
    cases, one = {**CRITICS, "own loss": own}, [replace(awkward[-1], finish_reason="length")]
    expected = updates(Ranks(), cases, make_model, one, tmp_path, 16384)
    for of_rank in gang(Layout(shard=2), updates, cases, make_model, one, tmp_path, 16384):
        for name in cases:
            assert_same(of_rank[name], expected[name], name)


def broken(
    ranks: Ranks, losses: Mapping[str, list[TrainRollout]], make_model: MakeModel, folder: Path
) -> list[tuple[str, bool, list[str]]]:
    """Of an update over two minibatches with each loss: why it broke down, whether weights moved, and the files saved."""
    found = []
    for number, (loss, rollouts) in enumerate(losses.items()):
        own = folder / f"loss {number} of rank {ranks.index}"
        case = Case({"policy_loss": loss, "adv_estimator": "reinforce_plus_plus"})
        trainer = trainer_of(ranks, case, make_model, own, max_refused_steps=1, max_tokens_per_pack=9)
        before = [weight.detach().clone() for weight in trainer.model.parameters()]
        with pytest.raises(NonFinite) as error:
            trainer.update(rollouts, 2)
        moved = not all(map(torch.equal, before, trainer.model.parameters()))
        found.append((str(error.value).partition(":")[0], moved, [path.name for path in own.glob("*")]))
    return found


def test_all_ranks_refuse_a_step_that_breaks_down_on_one_and_the_first_keeps_it(gang, make_model, awkward, tmp_path) -> None:
    (tmp_path / "own.py").write_text(OWN_LOSS.format(broken=True))
    unknown = [replace(awkward[1], logprobs=np.full_like(awkward[1].logprobs, np.nan)), *awkward[2:]]
    losses = {f"{tmp_path}/own.py:loss": awkward, "ppo": unknown}
    files = ["update_000003_refused_1.npz"]
    first, other = gang(Layout(shard=2), broken, losses, make_model, tmp_path)
    causes = ["the loss is nan in update 3", "a behaviour logprob is not finite in update 3"]
    assert first == [(cause, False, files) for cause in causes]
    assert other == [(cause, False, []) for cause in causes]


# ------------------------------------------------------------------------------------------------- warm starts


def warm_start(ranks: Ranks, make_model: MakeModel, examples: list[TokenSequence], pack: int) -> tuple[Made, list[float]]:
    """Gradients of three steps over batches of three; the losses of the steps, and at the end that of all examples."""
    model = make_model(0, 2.0, hidden_size=32, **HEADS)
    shard(model, ranks, PrecisionSpec())
    trainer = SupervisedTrainer(model, OptimizerSpec(**GENTLE), 3, max_tokens_per_pack=pack, ranks=ranks)
    gradients: list[dict[str, torch.Tensor]] = []
    keep_gradients(model, trainer.trained["policy"].adamw, gradients)
    figures: list[dict[str, float]] = []
    fit(trainer, examples, batch=3, on_step=lambda step, of_step: figures.append(of_step))
    losses = [trainer.loss(examples), trainer.loss(examples[:1])]
    return Made({"policy": gradients}, figures[-1], {}), [of_step["loss"] for of_step in figures] + losses


@pytest.mark.parametrize("layout", [Layout(shard=2), Layout(sp=2)])
def test_a_warm_start_on_two_ranks_is_that_of_one(layout: Layout, gang, make_model) -> None:
    rng = np.random.default_rng(0)
    examples = [TokenSequence(rng.integers(0, 16, n + 4), np.arange(3, n + 4)) for n in (1, 9, 2, 4, 7, 3)]
    expected, expected_losses = warm_start(Ranks(), make_model, examples, 16384)
    for made, losses in gang(layout, warm_start, make_model, examples, 14):
        assert_same(made, expected, "warm start")
        assert losses == pytest.approx(expected_losses, rel=1e-6)
