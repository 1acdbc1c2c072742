"""Engine, learner and bus with the model on a GPU: the same answers as a plain forward pass, and as on CPU."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from asyncrl.config import AlgorithmSpec, LearnerSpec
from asyncrl.generate.embedded.engine import TorchEngine
from asyncrl.learn.checkpoint import Checkpoints
from asyncrl.learn.trainer import PolicyTrainer
from asyncrl.models.loading import named_weights
from asyncrl.models.packed import PackedModel
from asyncrl.rundir import RunDir
from asyncrl.staleness import Staleness
from asyncrl.types import Generation, GenerationRequest, Sampling, Span, TrainRollout, Version
from asyncrl.weights.publisher import WeightPublisher
from asyncrl.weights.subscriber import WeightSubscriber

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
TEMPERATURE = 0.8
V0, V1 = Version(1, 0), Version(1, 1)
Dtype = Literal["float32", "bfloat16"]
# Largest and mean error per token. bfloat16 logits of size 4 to 8 are 1/32 apart, and every shape of batch rounds its own way.
TOLERANCE: dict[Dtype, tuple[float, float]] = {"float32": (2e-4, 2e-5), "bfloat16": (0.25, 0.03)}


def make_model(seed: int = 0, dtype: Dtype = "float32") -> PreTrainedModel:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.1,
        attn_implementation="sdpa",
    )
    return Qwen3ForCausalLM(config).to(DEVICE, getattr(torch, dtype)).eval()


def make_engine(model: PreTrainedModel) -> TorchEngine:
    """An engine that owns a copy of the model, and holds its weights as V0."""
    engine = TorchEngine(copy.deepcopy(model), slots=8, max_length=96)
    engine.update_weights(V0, named_weights(model))
    return engine


def make_requests(group: int, count: int, top_p: float = 1.0) -> list[GenerationRequest]:
    sampling = Sampling(temperature=TEMPERATURE, top_p=top_p, top_k=0, max_tokens=24, stop_token_ids=(0,))
    prompt = tuple(range(1 + group, 6 + 2 * group))
    return [
        GenerationRequest(id=f"{group}/{i}", group=group, prompt_ids=prompt, sampling=sampling, seed=100 * group + i)
        for i in range(count)
    ]


def full_logprobs(answer: Generation) -> np.ndarray:
    return np.array(answer.logprobs) + (0.0 if answer.kept_logmass is None else np.array(answer.kept_logmass))


@torch.no_grad()
def recomputed(models: dict[Version, PreTrainedModel], request: GenerationRequest, answer: Generation) -> np.ndarray:
    """The answer's logprobs from one plain forward pass per version."""
    ids = torch.tensor([[*request.prompt_ids, *answer.token_ids]], device=DEVICE)
    first, found, position = len(request.prompt_ids) - 1, [], 0
    for span in answer.spans:
        logprobs = (models[span.version](input_ids=ids).logits[0].float() / TEMPERATURE).log_softmax(-1)
        for i in range(position, position + span.length):
            found.append(logprobs[first + i, answer.token_ids[i]].item())
        position += span.length
    return np.array(found)


def make_rollouts(model: PreTrainedModel) -> list[TrainRollout]:
    """Four groups of four, sampled on the device, with rewards by hand."""
    engine, found = make_engine(model), []
    for group in range(4):
        requests = make_requests(group, 4)
        futures = engine.submit_group(requests)
        while engine.step():
            pass
        for i, (request, future) in enumerate(zip(requests, futures, strict=True)):
            answer = future.result(timeout=0)
            found.append(
                TrainRollout(
                    group=group,
                    rollout=i,
                    attempt=0,
                    data_source="test",
                    prompt_ids=np.array(request.prompt_ids),
                    response_ids=np.array(answer.token_ids),
                    loss_mask=np.ones(len(answer.token_ids), dtype=bool),
                    logprobs=np.array(answer.logprobs, dtype=np.float32),
                    kept_logmass=None,
                    updates=np.zeros(len(answer.token_ids), dtype=np.int64),
                    reward=float((group + i) % 3),
                    parts={},
                    finish_reason=answer.finish_reason,
                )
            )
    return found


def make_trainer(model: PreTrainedModel, folder: Path, *, reference: PreTrainedModel | None = None, **learner) -> PolicyTrainer:
    return PolicyTrainer(
        PackedModel(model, TEMPERATURE),
        LearnerSpec(batch_groups=4, lr=1e-3, **learner),
        AlgorithmSpec(kl_coef=0.1 if reference is not None else 0.0),
        Staleness(max_lag=1, batch_groups=4),
        total_steps=4,
        refused_dir=folder / "refused",
        reference=None if reference is None else PackedModel(reference, TEMPERATURE),
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_engine_logprobs_are_those_of_a_plain_forward_also_across_a_swap(dtype: Dtype, top_p: float) -> None:
    models = {V0: make_model(0, dtype), V1: make_model(1, dtype)}
    engine = make_engine(models[V0])
    requests = [*make_requests(0, 4, top_p), *make_requests(2, 3, top_p)]
    futures = engine.submit_group(requests)
    for _ in range(6):
        engine.step()
    engine.update_weights(V1, named_weights(models[V1]))
    while engine.step():
        pass
    answers = [future.result(timeout=0) for future in futures]
    assert any(len(answer.spans) == 2 and answer.spans[0] == Span(V0, 6) for answer in answers)
    pairs = zip(requests, answers, strict=True)
    errors = np.concatenate([np.abs(full_logprobs(answer) - recomputed(models, request, answer)) for request, answer in pairs])
    most, mean = TOLERANCE[dtype]
    assert errors.max() < most
    assert errors.mean() < mean


def test_an_update_on_the_gpu_is_that_of_the_cpu(tmp_path: Path) -> None:
    model = make_model()
    on_cpu = copy.deepcopy(model).cpu()
    rollouts = make_rollouts(model)
    start = {name: tensor.cpu().clone() for name, tensor in named_weights(model).items()}
    found = make_trainer(model, tmp_path).update(rollouts, committed=0)
    expected = make_trainer(on_cpu, tmp_path).update(rollouts, committed=0)
    assert found["actor/refused_steps"] == 0
    assert found["gap/logprob_max_abs"] < 2e-4  # engine and learner agree on the same device
    for name in ("actor/pg_loss", "actor/grad_norm", "actor/entropy", "reward/mean"):
        assert found[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5), name
    # Adam's first step is lr · sign(gradient): only where a gradient is all but 0 may the two differ.
    moved = torch.cat([(tensor.cpu() - start[name]).flatten() for name, tensor in named_weights(model).items()])
    wanted = torch.cat([(tensor - start[name]).flatten() for name, tensor in named_weights(on_cpu).items()])
    assert moved.abs().max() > 0.9e-3
    assert ((moved - wanted).abs() < 1e-5).float().mean() > 0.98


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_minibatches_epochs_a_reference_and_a_restore(tmp_path: Path, dtype: Dtype) -> None:
    model = make_model(0, dtype)
    rollouts = make_rollouts(model)
    trainer = make_trainer(model, tmp_path, reference=make_model(0, dtype), mini_batch_groups=2, ppo_epochs=2)
    figures = trainer.update(rollouts, committed=0)
    assert (figures["actor/optimizer_steps"], figures["actor/refused_steps"]) == (4, 0)
    assert figures["actor/kl_loss"] > 0  # the later steps have left the reference
    checkpoints = Checkpoints(RunDir(tmp_path / "run"), keep_last_n=1)
    checkpoints.save(trainer, V1)
    checkpoints.wait()
    other = make_trainer(make_model(1, dtype), tmp_path, reference=make_model(0, dtype), mini_batch_groups=2, ppo_epochs=2)
    assert checkpoints.restore(other) == 1
    assert next(other.model.parameters()).device.type == DEVICE
    again, once = other.update(rollouts, committed=1), trainer.update(rollouts, committed=1)
    assert again["actor/grad_norm"] == pytest.approx(once["actor/grad_norm"], rel=1e-2)


def test_a_refused_step_is_saved_from_the_gpu(tmp_path: Path) -> None:
    model = make_model()
    rollouts = make_rollouts(model)
    rollouts[3].logprobs[0] = np.nan
    before = {name: tensor.clone() for name, tensor in named_weights(model).items()}
    figures = make_trainer(model, tmp_path).update(rollouts, committed=0)
    assert figures["actor/refused_steps"] == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in named_weights(model).items())
    saved = np.load(tmp_path / "refused" / "update_000001_refused_1.npz")
    assert np.isnan(saved["behaviour"]).sum() == 1


@pytest.mark.parametrize("transport", ["auto", "tcp"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_published_from_one_model_on_the_gpu_and_swapped_into_another(
    transport: Literal["auto", "tcp"], dtype: Dtype, closing: Callable
) -> None:
    source, engine = make_model(1, dtype), make_engine(make_model(0, dtype))
    publisher = closing(WeightPublisher(1, transport=transport))
    subscriber = closing(WeightSubscriber(lambda: publisher.admit("generator-0"), transport=transport, poll_s=0.05))
    publisher.publish(V1, named_weights(source))
    news = subscriber.next(V0, wait_s=20.0)
    assert news is not None
    version, tensors = news
    assert version == V1
    for name, tensor in named_weights(source).items():
        assert tensors[name].device.type == "cpu"
        assert torch.equal(tensors[name], tensor.cpu()), name
    assert engine.update_weights(version, tensors).version == V1
    requests = make_requests(0, 4)
    futures = engine.submit_group(requests)
    while engine.step():
        pass
    most, _ = TOLERANCE[dtype]
    for request, future in zip(requests, futures, strict=True):
        answer = future.result(timeout=0)
        assert answer.spans == (Span(V1, len(answer.token_ids)),)
        np.testing.assert_allclose(answer.logprobs, recomputed({V1: source}, request, answer), atol=most)


@pytest.fixture
def closing():
    """closing(x): x, closed with the test."""
    made: list = []

    def add(thing):
        made.append(thing)
        return thing

    yield add
    for thing in reversed(made):
        thing.close()
