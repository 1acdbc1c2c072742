"""Tiny models made on the spot, and a scripted store, weight source and engine for the generator."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from asyncrl.errors import Closed, Unavailable
from asyncrl.interfaces import Told
from asyncrl.types import (
    Generation,
    GenerationRequest,
    Prompt,
    Reserved,
    Rollout,
    RolloutPiece,
    Sampling,
    Span,
    SwapReport,
    Ticket,
    Version,
)

WAIT_S = 10.0  # bound of every wait in the tests
WINDOW = 5
MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
CONFIGS: dict[str, tuple[type[PreTrainedConfig], dict[str, object]]] = {
    "qwen3": (Qwen3Config, {}),
    "llama": (LlamaConfig, {}),
    "mistral, all layers see 5 tokens": (MistralConfig, {"sliding_window": WINDOW}),
    "gemma3, every other layer sees 5": (Gemma3TextConfig, MIXED | {"query_pre_attn_scalar": 8}),
    "gemma2, eager, capped scores": (Gemma2Config, MIXED | {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0}),
    "gpt_oss, eager, sinks": (GptOssConfig, MIXED | EXPERTS),
    "llama4, every other layer sees its chunk of 5": (
        Llama4TextConfig,
        EXPERTS
        | {"attention_chunk_size": WINDOW, "layer_types": ["chunked_attention", "full_attention"], "intermediate_size_mlp": 48},
    ),
}


@pytest.fixture
def make_model() -> Callable[..., PreTrainedModel]:
    """make_model(kind, seed): one of CONFIGS with two layers, grouped-query attention and lively (not flat) logits."""

    def make(kind: str = "qwen3", seed: int = 0, **fields: object) -> PreTrainedModel:
        torch.manual_seed(seed)
        shape = {
            "vocab_size": 24,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 96,
        }
        config, own = CONFIGS[kind]
        attention = "eager" if "eager" in kind else "sdpa"
        model = AutoModelForCausalLM.from_config(config(**shape | own | fields), attn_implementation=attention)
        with torch.no_grad():
            model.lm_head.weight.mul_(12.0)
            if model.lm_head.weight is not model.model.embed_tokens.weight:
                model.model.embed_tokens.weight.mul_(10.0)
        return model.eval()

    return make


@pytest.fixture
def make_request() -> Callable[..., GenerationRequest]:
    """make_request(id, prompt=…, seed=…, group=…, **sampling)."""

    def make(
        id: str = "a", prompt: Sequence[int] = (1, 2, 3), seed: int = 7, group: int = 0, **sampling: object
    ) -> GenerationRequest:
        settings = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_tokens": 12, "stop_token_ids": ()} | sampling
        return GenerationRequest(id=id, group=group, prompt_ids=tuple(prompt), sampling=Sampling(**settings), seed=seed)

    return make


@pytest.fixture
def make_ticket() -> Callable[..., Ticket]:
    """make_ticket(group, rollouts, purpose=…, pinned=…)."""

    def make(group: int, rollouts: Sequence[int] = (0, 1), **fields: object) -> Ticket:
        return Ticket(
            group=group,
            attempt=0,
            prompt=Prompt(row=group, ids=(1, 2, 3), data_source="test"),
            rollouts=tuple(rollouts),
            seeds=tuple(100 + r for r in rollouts),
            sampling=Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=4, stop_token_ids=()),
            **fields,
        )

    return make


class FakeEngine:
    """Ends a request only when the test says `answer(id)`; swaps at once, and remembers all calls."""

    def __init__(self, slots: int = 4) -> None:
        self.slots = slots  # a test may change it at any time
        self.version: Version | None = None
        self.hands_over = False
        self.pending: dict[str, tuple[GenerationRequest, Future[Generation], Version | None]] = {}
        self.swaps: list[Version] = []
        self.aborted: list[int | None] = []
        self.changed = threading.Condition()
        self.hangs = False
        self.told: Told | None = None  # of the newest requests
        self.tokens = 0  # of requests that have not ended

    def submit_group(self, requests: Sequence[GenerationRequest], told: Told | None = None) -> "list[Future[Generation]]":
        self.told = told
        futures: list[Future[Generation]] = [Future() for _ in requests]
        with self.changed:
            self.pending |= {r.id: (r, f, self.version) for r, f in zip(requests, futures, strict=True)}
            self.changed.notify_all()
        return futures

    def wait(self, condition: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, WAIT_S), "the engine never got there"

    def answer(self, id: str, reason: str = "length") -> None:
        self.wait(lambda: id in self.pending)
        _, future, version = self.pending.pop(id)
        spans = (Span(version, 2),) if reason != "abort" else ()
        tokens = [5, 6] if reason != "abort" else []
        future.set_result(
            Generation(
                id=id,
                token_ids=tokens,
                logprobs=[-1.0] * len(tokens),
                kept_logmass=None,
                spans=spans,
                finish_reason=reason,
            )
        )

    def update_weights(self, version: Version, tensors: object) -> SwapReport:
        with self.changed:
            self.version = version
            self.swaps.append(version)
            self.changed.notify_all()
        return SwapReport(version=version, pause_s=0.25, recomputed_tokens=3, discarded_tokens=2)

    def gauges(self) -> dict[str, float]:
        return {"pending": float(len(self.pending))}

    def progress(self) -> int:
        return self.tokens

    def health(self, deadline_s: float) -> None:
        if self.hangs:
            raise Unavailable(f"no step in {deadline_s} s")

    def abort(self, group: int | None = None) -> None:
        assert not self.hangs, "an abort waits for the step that hangs"
        with self.changed:
            self.aborted.append(group)
            doomed = [id for id, (request, *_) in self.pending.items() if group in (None, request.group)]
            self.changed.notify_all()
        for id in doomed:
            self.answer(id, "abort")


class FakeStore:
    """Hands out the tickets that the test puts into `tickets`, in as large pieces as asked for; long polls like a real one."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.tickets: list[Ticket] = []
        self.cancelled: list[int] = []
        self.ended = False
        self.error: Exception | None = None
        self.waiting_for = "bound full"
        self.calls: list[tuple[int, Version, tuple[int, ...]]] = []
        self.rollouts: list[Rollout] = []
        self.pieces: list[RolloutPiece] = []
        self.submits: list[int] = []  # how many rollouts came with each call
        self.recalled = False

    def put(self, *tickets: Ticket, **fields: object) -> None:
        with self.changed:
            self.tickets.extend(tickets)
            for name, value in fields.items():
                setattr(self, name, value)
            self.changed.notify_all()

    def wait(self, condition: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, WAIT_S), "the store never saw it"

    def reserve(self, k: int, version: Version, held: Sequence[int], wait_s: float) -> Reserved:
        with self.changed:
            self.calls.append((k, version, tuple(held)))
            self.changed.notify_all()
            news = lambda: (self.tickets and k) or self.cancelled or self.ended or self.error or self.recalled  # noqa: E731
            self.changed.wait_for(news, wait_s)
            self.recalled = False
            if self.error is not None:
                raise self.error
            taken, self.tickets = self.tickets[:k], self.tickets[k:]
            cancelled, self.cancelled = self.cancelled, []
            return Reserved(
                tickets=tuple(taken),
                cancelled=tuple(cancelled),
                ended=self.ended and not self.tickets,
                waiting_for="" if taken or k == 0 else self.waiting_for,
            )

    def recall(self) -> None:
        self.put(recalled=True)

    def submit(self, rollouts: Sequence[Rollout]) -> None:
        with self.changed:
            self.rollouts.extend(rollouts)
            self.submits.append(len(rollouts))
            self.changed.notify_all()

    def stream(self, pieces: Sequence[RolloutPiece]) -> None:
        with self.changed:
            self.pieces.extend(pieces)
            self.changed.notify_all()


class FakeWeights:
    """Hands out versions in the order in which the test publishes them."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.newest: Version | None = None
        self.closed = False
        self.received_bytes = 0

    def publish(self, version: Version) -> None:
        with self.changed:
            self.newest = version
            self.changed.notify_all()

    def next(self, after: Version | None, wait_s: float) -> "tuple[Version, dict[str, object]] | None":
        with self.changed:
            self.changed.wait_for(lambda: self.closed or self.newest not in (None, after), wait_s)
            if self.closed:
                raise Closed("the bus was closed")
            return None if self.newest in (None, after) else (self.newest, {})

    def gauges(self) -> dict[str, float]:
        return {"versions": 1.0, "received_bytes": float(self.received_bytes)}

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.changed.notify_all()


@pytest.fixture
def fake_engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def fake_store() -> FakeStore:
    return FakeStore()


@pytest.fixture
def fake_weights() -> FakeWeights:
    return FakeWeights()
