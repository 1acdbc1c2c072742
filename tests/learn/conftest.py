"""Tiny models, rollouts with known columns, and a scripted store and bus."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from asyncrl.config import AlgorithmSpec, CriticSpec, LearnerSpec
from asyncrl.learn.critic import Critic
from asyncrl.learn.trainer import PolicyTrainer
from asyncrl.learn.update import RefusedSteps
from asyncrl.lineage import Fence, Lineage
from asyncrl.models.memory import FlatTensors
from asyncrl.models.packed import PackedModel
from asyncrl.models.value import OwnValues, SharedValues
from asyncrl.staleness import Staleness
from asyncrl.types import BatchLease, TrainRollout, Version


def tiny_model(seed: int = 0, scale: float = 8.0, **changes: object) -> PreTrainedModel:
    torch.manual_seed(seed)
    fields = {
        "vocab_size": 16,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    }
    model = Qwen3ForCausalLM(Qwen3Config(**{**fields, **changes})).eval()
    with torch.no_grad():  # larger than initialized, so that distributions differ visibly from uniform
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    return model


def rollout(group: int, index: int, *, updates: Sequence[int] = (0, 0, 0), seed: int = 0, **fields: object) -> TrainRollout:
    """A rollout of group `group` whose prompt depends on the group alone. `fields` replaces columns."""
    generator = np.random.default_rng((seed, group, index))
    length = len(updates)
    columns = {
        "group": group,
        "rollout": index,
        "attempt": 0,
        "data_source": "test",
        "prompt_ids": np.random.default_rng((seed, group)).integers(0, 16, 3 + group % 3),
        "response_ids": generator.integers(0, 16, length),
        "loss_mask": np.ones(length, dtype=bool),
        "logprobs": generator.uniform(-4, -1, length).astype(np.float32),
        "kept_logmass": None,
        "updates": np.array(updates, dtype=np.int64),
        "reward": float(generator.integers(0, 5)),
        "parts": {},
        "finish_reason": "stop",
    }
    return TrainRollout(**{**columns, **fields})


def rollouts(groups: int = 4, n: int = 3, seed: int = 0, oldest: int = 0) -> list[TrainRollout]:
    """Groups × n rollouts of 1 to 6 tokens, whose first token is from update `oldest`."""
    found = []
    for group in range(groups):
        for index in range(n):
            length = 1 + (5 * group + 3 * index) % 6
            found.append(rollout(group, index, updates=[oldest] + [0] * (length - 1), seed=seed))
    return found


class FakeStore:
    """Plays a script of leases; writes down every call. Rows are made from the group ids.

    calls: those of the learner's own thread. asked: updates for which a batch was asked, by its helper.
    """

    def __init__(self, leases: Sequence[BatchLease], calls: list, fence: Fence | None = None) -> None:
        self.leases = list(leases)
        self.calls = calls
        self.asked: list[int] = []
        self.answer = fence or Fence(incarnation=3, committed=0, reopened=0)
        self.metrics: list[dict[str, float]] = []
        self.on_lease: Callable[[], None] = lambda: None
        self.history = Lineage(oldest=0, newest=dict.fromkeys(range(9), 1000))  # of the first learners, everything counts

    def lineage(self) -> Lineage:
        return self.history

    def fence(self, committed: int) -> Fence:
        self.calls.append(("fence", committed))
        return self.answer

    def lease_batch(self, update: int, wait_s: float) -> BatchLease:
        self.asked.append(update)
        self.on_lease()
        return self.leases.pop(0)

    def rows(self, groups: Sequence[int]) -> list[TrainRollout]:
        return [rollout(group, index) for group in groups for index in range(3)]

    def commit(self, lease: int, version: Version, metrics: Mapping[str, float]) -> None:
        self.calls.append(("commit", lease, str(version)))
        self.metrics.append(dict(metrics))

    def request_eval(self, version: Version) -> None:
        self.calls.append(("eval", str(version)))

    def checkpointed(self, oldest_retained: int) -> None:
        self.calls.append(("checkpointed", oldest_retained))


class FakeBus:
    def __init__(self, calls: list) -> None:
        self.calls = calls
        self.published: dict[str, dict[str, torch.Tensor]] = {}

    def publish(self, version: Version, stage: Callable[[str], FlatTensors]) -> None:
        self.calls.append(("publish", str(version)))
        self.published[str(version)] = {name: tensor.clone() for name, tensor in stage(f"weights {version}").items()}

    def gauges(self) -> dict[str, float]:
        return {"receivers": 2.0}

    def close(self) -> None: ...


@pytest.fixture
def make_model() -> Callable[..., PreTrainedModel]:
    return tiny_model


@pytest.fixture
def make_rollout() -> Callable[..., TrainRollout]:
    return rollout


@pytest.fixture
def make_rollouts() -> Callable[..., list[TrainRollout]]:
    return rollouts


@pytest.fixture
def awkward() -> list[TrainRollout]:
    """Four groups of three with tool tokens inside, a row without a trained token, a group of two and one of one.

    Every second rollout's tokens earn something, whether they are trained or not; every group has a baseline.
    """
    found = []
    for i, r in enumerate(rollouts(oldest=-1)):  # at committed = 2 the first token of each lags by 3 > 2
        mask = np.ones(len(r.response_ids), dtype=bool)
        mask[1:-1:2] = False
        earned = np.linspace(-0.5, 1.0, len(mask)) if i % 2 == 0 else None
        found.append(
            replace(r, loss_mask=mask if i != 4 else np.zeros_like(mask), token_rewards=earned, baseline=0.5 * r.group)
        )
    return [r for i, r in enumerate(found) if i not in (2, 10, 11)]


@pytest.fixture
def padded(awkward: list[TrainRollout]) -> list[TrainRollout]:
    """`awkward` with what padding would be: tokens after each response that the policy did not choose."""

    def longer(column: np.ndarray, value: float) -> np.ndarray:
        return np.concatenate((column, np.full(4, value, dtype=column.dtype)))

    return [
        replace(
            r,
            response_ids=longer(r.response_ids, 1),
            loss_mask=longer(r.loss_mask, False),
            logprobs=longer(r.logprobs, np.nan),
            updates=longer(r.updates, 2),
            token_rewards=None if r.token_rewards is None else longer(r.token_rewards, 0.0),
        )
        for r in awkward
    ]


@pytest.fixture
def make_store() -> type[FakeStore]:
    return FakeStore


@pytest.fixture
def make_bus() -> type[FakeBus]:
    return FakeBus


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., PolicyTrainer]:
    def make(
        *,
        learner: dict | None = None,
        algorithm: dict | None = None,
        max_lag: int = 2,
        model=None,
        reference=None,
        critic: dict | None = None,
    ) -> PolicyTrainer:
        spec = LearnerSpec(**{"batch_groups": 4, "lr": 1e-2, **(learner or {})})
        model = model or tiny_model()
        return PolicyTrainer(
            PackedModel(model, 0.8),
            spec,
            AlgorithmSpec(**(algorithm or {})),
            Staleness(max_lag=max_lag, batch_groups=spec.batch_groups),
            total_steps=20,
            refused_dir=tmp_path / "refused",
            reference=None if reference is None else PackedModel(reference, 0.8),
            critic=None if critic is None else tiny_critic(model, tmp_path / "refused" / "critic", critic),
        )

    return make


def tiny_critic(policy: PreTrainedModel, refused_dir: Path, fields: dict) -> Critic:
    """A critic whose head does not start at zero, own or on `policy`."""
    spec = CriticSpec(**{"lr": 1e-2, "eps": 1e-3, **fields})
    values = SharedValues(policy) if spec.backbone == "shared" else OwnValues(tiny_model(seed=7))
    head = values.module if isinstance(values, SharedValues) else values.module.get_output_embeddings()
    torch.manual_seed(8)
    torch.nn.init.normal_(head.weight, std=0.3)
    return Critic(values, spec, RefusedSteps(refused_dir, 3), total_steps=20)
