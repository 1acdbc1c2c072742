"""Tokens per second of the torch engine against `model.generate`: `python tests/bench/bench_engine.py [BATCH …] [--large]`.

One thread (its CPU time counts, so that a busy machine disturbs less), a 0.8M-parameter Qwen3, temperature 1. Ratios above
1: the engine is faster. `--large`: 100M parameters, of which one round is run. *equal*: groups of 8 rollouts per prompt, all
of the same length. *distinct*: the same, every prompt another. *mixed*: log-normal lengths; `generate` runs each batch to its
longest, and only wanted tokens count. *refill*: mixed, with four batches of requests queued, so that slots are filled again
as they free.

*unlike*: a step of 63 short rows and one of 1,900 tokens against one of 64 short rows, and the memory of the cache for what is
used. *swap*: 8 groups of 8 with prompts of 400 tokens, computed anew.
"""

import sys
import time

import numpy as np
import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from asyncrl.generate.embedded.engine import TorchEngine
from asyncrl.models.loading import named_weights
from asyncrl.types import GenerationRequest, Sampling, Version

PROMPT, RESPONSE, GROUP, REPEATS = 16, 48, 8, 5


def tiny_model(positions: int = 512, scale: int = 1) -> PreTrainedModel:
    """scale: of the widths, above 1 with 12 layers instead of 4."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=32,
        hidden_size=128 * scale,
        intermediate_size=384 * scale,
        num_hidden_layers=4 if scale == 1 else 12,
        num_attention_heads=4 * scale,
        num_key_value_heads=2 * scale,
        head_dim=32,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    return Qwen3ForCausalLM(config).eval()


def engine_seconds(engine: TorchEngine, prompts: np.ndarray, lengths: np.ndarray) -> float:
    requests = [
        GenerationRequest(
            id=str(i),
            group=i,
            prompt_ids=tuple(prompt.tolist()),
            sampling=Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=int(length), stop_token_ids=()),
            seed=i,
        )
        for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
    ]
    started = time.thread_time()
    futures = engine.submit_group(requests)
    while engine.step():
        pass
    seconds = time.thread_time() - started
    assert [len(f.result().token_ids) for f in futures] == lengths.tolist()
    return seconds


def generate_seconds(model: PreTrainedModel, prompts: np.ndarray, lengths: np.ndarray, batch: int) -> float:
    started = time.thread_time()
    for first in range(0, len(prompts), batch):
        ids = torch.from_numpy(prompts[first : first + batch])
        longest = int(lengths[first : first + batch].max())
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                top_k=0,
                max_new_tokens=longest,
                min_new_tokens=longest,
            )
        assert out.shape[1] == PROMPT + longest
    return time.thread_time() - started


def started(engine: TorchEngine, prompts: list[list[int]]) -> None:
    """Three steps of requests that have 40 to go."""
    sampling = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=43, stop_token_ids=())
    engine.submit_group(
        [
            GenerationRequest(id=str(i), group=i, prompt_ids=tuple(prompt), sampling=sampling, seed=i)
            for i, prompt in enumerate(prompts)
        ]
    )
    for _ in range(3):
        engine.step()


def unlike(model: PreTrainedModel) -> str:
    step_ms: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(REPEATS):
        for long, times in step_ms.items():
            engine = TorchEngine(model, slots=64, max_length=2048)
            engine.update_weights(Version(0, 0), named_weights(model))
            started(engine, [[1] * 20] * 63 + [[1] * (1860 if long else 20)])
            for _ in range(35):
                before = time.thread_time()
                engine.step()
                times.append(1e3 * (time.thread_time() - before))
    rows, cache = engine._batch._rows, engine._batch._decoder.cache
    taken = sum(of.nbytes for layer in cache.used for of in (*layer.keys, *layer.values))
    used = int(rows.length[:64].sum()) * cache._position_bytes
    short, long_ = np.median(step_ms[False]), np.median(step_ms[True])
    return (
        f"unlike: {long_:.1f} ms a step, {short:.1f} without the long row; {taken / 2**20:.1f} MiB for {used / 2**20:.1f} used"
    )


def swap(model: PreTrainedModel) -> str:
    engine = TorchEngine(model, slots=64, max_length=2048)
    engine.update_weights(Version(0, 0), named_weights(model))
    started(engine, [[group] * 400 for group in range(8) for _ in range(8)])
    for _ in range(7):
        engine.step()
    before = time.thread_time()
    tokens = engine.update_weights(Version(0, 1), named_weights(model)).recomputed_tokens
    return f"swap: {tokens:,} tokens computed in {time.thread_time() - before:.2f} s"


def compare(
    engine: TorchEngine, plain: PreTrainedModel, batch: int, lengths: np.ndarray, prompts: np.ndarray, rounds: int
) -> tuple[float, float]:
    """Best tokens/s of engine and of `generate`, taken in turns, so that a busy machine slows both."""
    ours, theirs = [], []
    for _ in range(rounds):
        theirs.append(generate_seconds(plain, prompts, lengths, batch))
        ours.append(engine_seconds(engine, prompts, lengths))
    return lengths.sum() / min(ours), lengths.sum() / min(theirs)


def main() -> int:
    torch.set_num_threads(1)
    batches = [int(batch) for batch in sys.argv[1:] if batch != "--large"]
    scale, rounds = (6, 1) if "--large" in sys.argv else (1, REPEATS)
    plain, rng = tiny_model(scale=scale), np.random.default_rng(0)
    print(f"{plain.num_parameters() / 1e6:.1f}M parameters")
    print(f"{'batch':>5} {'lengths':>8} {'engine tok/s':>13} {'generate tok/s':>15} {'ratio':>6}")
    for batch in batches or (8, 32, 64):
        model = tiny_model(scale=scale)
        engine = TorchEngine(model, slots=batch, max_length=512)
        engine.update_weights(Version(0, 0), named_weights(model))
        mixed = np.clip(rng.lognormal(np.log(RESPONSE / 2), 0.8, size=4 * batch), 1, 256).astype(int)
        distinct = rng.integers(0, 32, size=(4 * batch, PROMPT))
        grouped = np.repeat(distinct[: 4 * batch // GROUP], GROUP, axis=0)
        equal = np.full(batch, RESPONSE)
        cases = {
            "equal": (equal, grouped[:batch]),
            "distinct": (equal, distinct[:batch]),
            "mixed": (mixed[:batch], grouped[:batch]),
            "refill": (mixed, grouped),
        }
        for name, (lengths, prompts) in cases.items():
            ours, theirs = compare(engine, plain, batch, lengths, prompts, rounds)
            print(f"{batch:>5} {name:>8} {ours:>13.0f} {theirs:>15.0f} {ours / theirs:>6.2f}", flush=True)
    print(unlike(tiny_model(2048)), swap(tiny_model(2048)), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
