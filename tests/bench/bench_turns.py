"""What it is worth to keep an episode's keys and values from turn to turn: prompt tokens computed and CPU, with and without, in
turns; 64 episodes side by side in the embedded engine.

    python tests/bench/bench_turns.py
"""

import random
import time
from collections.abc import Iterator
from contextlib import suppress
from statistics import median

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from asyncrl.generate.embedded.engine import TorchEngine
from asyncrl.models.loading import named_weights
from asyncrl.types import GenerationRequest, Sampling, Version

EPISODES, ROUNDS = 64, 3
# Turns, tokens of an answer, tokens that are read after it.
SHAPES = [(4, 3, 3), (4, 24, 24), (16, 3, 3), (16, 24, 24), (16, 24, 96)]


def episode(number: int, turns: int, answer: int, read: int, keep: bool) -> Iterator[GenerationRequest]:
    """Is sent each answer; says what is asked next."""
    rng = random.Random(number)
    sampling = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=answer, stop_token_ids=())
    prompt: list[int] = rng.choices(range(87), k=read)
    for turn in range(turns):
        request = GenerationRequest(
            id=f"{number}/{turn}", group=number // 8, prompt_ids=tuple(prompt), sampling=sampling, seed=number, goes_on=keep
        )
        prompt += (yield request).token_ids + rng.choices(range(87), k=read)


def play(engine: TorchEngine, turns: int, answer: int, read: int, keep: bool) -> tuple[float, float]:
    """Prompt tokens computed and CPU seconds of all episodes."""
    before, started = engine.gauges()["prefilled_tokens"], time.process_time()
    playing = [episode(number, turns, answer, read, keep) for number in range(EPISODES)]
    asked = [(one, engine.submit_group([next(one)])[0]) for one in playing]
    while asked:
        engine.step()
        for one, future in [pair for pair in asked if pair[1].done()]:
            asked.remove((one, future))
            with suppress(StopIteration):
                asked.append((one, engine.submit_group([one.send(future.result())])[0]))
    return engine.gauges()["prefilled_tokens"] - before, time.process_time() - started


def main() -> None:
    torch.set_num_threads(1)
    config = Qwen3Config(
        vocab_size=87,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=24,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    model = Qwen3ForCausalLM(config).eval()
    engine = TorchEngine(model, slots=EPISODES, max_length=4096)
    tensors = {name: tensor.clone() for name, tensor in named_weights(model).items()}
    for shape in SHAPES:
        found: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
        for number in range(2 * ROUNDS):
            engine.update_weights(Version(1, number), tensors)  # which leaves nothing of the last round
            found[number % 2 == 1].append(play(engine, *shape, keep=number % 2 == 1))
        (tokens, without_s), (kept, with_s) = (
            (rounds[0][0], median(seconds for _, seconds in rounds)) for rounds in (found[False], found[True])
        )
        turns, answer, read = shape
        print(
            f"{turns:2} turns of {answer} tokens, {read} read after each: {tokens:,.0f} → {kept:,.0f} prompt tokens computed, "
            f"{without_s:.2f} → {with_s:.2f} s of CPU ({without_s / with_s:.2f} ×)",
            flush=True,
        )


if __name__ == "__main__":
    main()
