"""Learner: samples/s of a whole update, against a plain loop over the same packs, and against padded rows. Prints ratios.

Run: python tests/bench/bench_learner.py [threads]
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from asyncrl.config import AlgorithmSpec, LearnerSpec, OptimizerSpec
from asyncrl.learn.batch import make_packs
from asyncrl.learn.sft import SupervisedTrainer, fit
from asyncrl.learn.trainer import PolicyTrainer
from asyncrl.models.packed import PackedModel, TokenSequence
from asyncrl.models.ranks import Ranks
from asyncrl.staleness import Staleness
from asyncrl.types import TrainRollout

VOCABULARY = 32


def make_model() -> PreTrainedModel:
    """About 0.8M parameters, the size of the arithmetic recipe's."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    return Qwen3ForCausalLM(config).eval()


def make_rollouts(count: int, prompt: tuple[int, int], response: tuple[int, int]) -> list[TrainRollout]:
    """Rollouts in groups of 8; lengths uniform in [low, high]."""
    generator = np.random.default_rng(0)
    rollouts = []
    for i in range(count):
        if i % 8 == 0:
            prompt_ids = generator.integers(0, VOCABULARY, int(generator.integers(prompt[0], prompt[1] + 1)))
        length = int(generator.integers(response[0], response[1] + 1))
        rollouts.append(
            TrainRollout(
                group=i // 8,
                rollout=i % 8,
                attempt=0,
                data_source="bench",
                prompt_ids=prompt_ids,
                response_ids=generator.integers(0, VOCABULARY, length),
                loss_mask=np.ones(length, dtype=bool),
                logprobs=np.full(length, -np.log(VOCABULARY), dtype=np.float32),
                kept_logmass=None,
                updates=np.zeros(length, dtype=np.int64),
                reward=float(generator.random()),
                parts={},
                finish_reason="stop",
            )
        )
    return rollouts


def alternate(*works: Callable[[], object], repeats: int = 9) -> list[float]:
    """Fastest seconds of each; run in turns, so that all see the same machine."""
    seconds: list[list[float]] = [[] for _ in works]
    for _ in range(repeats):
        for work, into in zip(works, seconds, strict=True):
            started = time.perf_counter()
            work()
            into.append(time.perf_counter() - started)
    return [min(of) for of in seconds]


def padded(model: PreTrainedModel, rollouts: list[TrainRollout]) -> Callable[[], None]:
    """What a plain loop does: right-padded rows, logits everywhere, one masked loss, backward, AdamW."""
    rows = [np.concatenate((r.prompt_ids, r.response_ids)) for r in rollouts]
    width = max(map(len, rows))
    ids = torch.tensor(np.stack([np.pad(row, (0, width - len(row))) for row in rows]))
    mask = torch.tensor(np.stack([np.arange(width) < len(row) for row in rows])).long()
    start = torch.tensor([len(r.prompt_ids) for r in rollouts])[:, None]
    wanted = (torch.arange(width) >= start) & mask.bool()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)

    def step() -> None:
        optimizer.zero_grad()
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        logprobs = logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        (-(logprobs * wanted[:, 1:]).sum() / wanted.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def packed(model: PreTrainedModel, rollouts: list[TrainRollout], pack_tokens: int) -> Callable[[], None]:
    """A plain loop over packs that are there already: forward, PPO's clipped loss, backward, AdamW. No metrics, no guards."""
    sequences = [
        TokenSequence(
            np.concatenate((r.prompt_ids, r.response_ids)),
            np.arange(len(r.response_ids)) + len(r.prompt_ids),
            len(r.prompt_ids) - 1,
        )
        for r in rollouts
    ]
    packs = make_packs(sequences, range(len(sequences)), pack_tokens, torch.device("cpu"), Ranks())
    tokens = sum(len(r.response_ids) for r in rollouts)
    old_n, advantage_n = torch.full((tokens,), -np.log(VOCABULARY)), torch.randn(tokens)
    policy, optimizer = PackedModel(model), torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        for pack in packs:
            ratio_t = (policy.logprobs(pack) - old_n[pack.flat_t]).exp()
            advantage_t = advantage_n[pack.flat_t]
            loss_t = -torch.minimum(ratio_t * advantage_t, ratio_t.clamp(0.8, 1.2) * advantage_t)
            (loss_t.sum() / tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def compare(name: str, rollouts: list[TrainRollout], pack_tokens: int) -> None:
    with TemporaryDirectory() as folder:
        spec = LearnerSpec(batch_groups=len(rollouts) // 8, max_tokens_per_pack=pack_tokens)
        bound = Staleness(max_lag=4, batch_groups=spec.batch_groups)
        trainer = PolicyTrainer(
            PackedModel(make_model()), spec, AlgorithmSpec(), bound, total_steps=10, refused_dir=Path(folder)
        )
        others = packed(make_model(), rollouts, pack_tokens), padded(make_model(), rollouts)
        ours, loop, rows = alternate(lambda: trainer.update(rollouts, 0), *others)
    samples = " | ".join(f"{len(rollouts) / seconds:.0f}" for seconds in (ours, loop, rows))
    print(f"| {name} | {pack_tokens} | {samples} | {loop / ours:.2f} | {rows / ours:.2f} |", flush=True)


def warm_start(steps: int = 10, batch: int = 256) -> None:
    generator = np.random.default_rng(0)
    lengths = generator.integers(3, 7, 2048)
    examples = [TokenSequence(generator.integers(0, 32, 9 + length), np.arange(9, 9 + length)) for length in lengths]
    started = time.perf_counter()
    fit(SupervisedTrainer(make_model(), OptimizerSpec(lr=1e-3), steps, max_tokens_per_pack=2048), examples, batch=batch)
    seconds = time.perf_counter() - started
    print(f"supervised warm start: {steps * batch / seconds:.0f} samples/s, {seconds / steps * 1000:.0f} ms a step of {batch}")


def main(threads: int = 1) -> None:
    torch.set_num_threads(threads)
    print(f"threads: {threads}; samples/s, and what an update has of a plain loop's over packs, and over padded rows")
    print(
        "| rollouts | pack tokens | update | packed loop | padded rows | ÷ packed | ÷ padded |\n|---|---|---|---|---|---|---|"
    )
    for pack_tokens in (256, 512, 1024, 2048):
        compare("128 × (8 + 6)", make_rollouts(128, (8, 8), (6, 6)), pack_tokens)
    compare("128 × (8 + 2..10)", make_rollouts(128, (8, 8), (2, 10)), 1024)
    compare("32 × (20..60 + 40..400)", make_rollouts(32, (20, 60), (40, 400)), 1024)
    compare("32 × (20..60 + 40..400)", make_rollouts(32, (20, 60), (40, 400)), 2048)
    warm_start()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
