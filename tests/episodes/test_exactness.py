"""The learner finds for every trained token of an episode the log-probability that it was sampled with: over turns, branches,
rewritten histories, calls side by side, and swaps in the middle of an answer."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import pytest
import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from asyncrl.episodes.conversations import Asked, Conversations
from asyncrl.episodes.session import Budget, Session
from asyncrl.generate.embedded.engine import TorchEngine
from asyncrl.learn.batch import make_batch, make_packs
from asyncrl.models.loading import named_weights
from asyncrl.models.packed import PackedModel
from asyncrl.models.ranks import Ranks
from asyncrl.staleness import Staleness
from asyncrl.types import Episode, Generation, GenerationRequest, Sampling, TrainRollout, Version

TOLERANCE = 1e-5  # nats
VERSIONS = [Version(1, update) for update in range(6)]
FIRST = {"role": "user", "content": "hello look " * 35}  # long enough for the engine to keep what it computed
Ask = Callable[[list[dict]], Awaitable[dict]]


def model(version: Version, vocabulary: int) -> PreTrainedModel:
    """Versions differ far more than two learners' steps would."""
    torch.manual_seed(version.update)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    made = Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8.0)
    return made


def tool(text: str) -> dict:
    return {"role": "tool", "content": text}


async def turns(ask: Ask) -> None:
    said = [FIRST]
    for _ in range(4):
        said += [await ask(said), tool("look here")]


async def branches(ask: Ask) -> None:
    start = [FIRST, await ask([FIRST]), tool("here")]
    for word in ("look", "hello", "look"):  # the last one is asked again
        branch = [*start, {"role": "user", "content": word}]
        await ask([*branch, await ask(branch), tool("here")])


async def rewritten(ask: Ask) -> None:
    """An agent that sums up, and one that drops what it heard first."""
    said = [FIRST, await ask([FIRST]), tool("look here")]
    said.append(await ask(said))
    summary = [{"role": "user", "content": "look answer."}, *said[2:], tool("here")]
    await ask([*summary, await ask(summary), tool("hello")])


async def side_by_side(ask: Ask) -> None:
    start = [FIRST, await ask([FIRST])]
    words = ("look", "here", "hello", "look")
    answers = await asyncio.gather(*(ask([*start, {"role": "user", "content": word}]) for word in words))
    await ask([*start, {"role": "user", "content": "look"}, answers[0], tool("here")])


class Stepped:
    """An engine that steps while somebody waits for it, and swaps after every so many steps."""

    def __init__(self, engine: TorchEngine, models: Sequence[PreTrainedModel], every: int) -> None:
        self.engine, self._models, self._every, self._steps = engine, models, every, 0
        self._swap(0)

    def _swap(self, number: int) -> None:
        tensors = {name: tensor.clone() for name, tensor in named_weights(self._models[number]).items()}
        self.engine.update_weights(VERSIONS[number], tensors)

    async def ask(self, request: GenerationRequest) -> Generation:
        future = self.engine.submit_group([request])[0]
        while not future.done():
            await asyncio.sleep(0)  # whoever asks side by side
            if not future.done():
                self.engine.step()
                self._steps += 1
                number, left = divmod(self._steps, self._every)
                if not left and number < len(VERSIONS):
                    self._swap(number)
        return future.result()


def gaps(row: TrainRollout, models: Sequence[PreTrainedModel], temperature: float) -> tuple[int, float]:
    """Over the tokens of all versions, each at lag 0 under its own: how many, and max |learner − behaviour|."""
    count, largest = 0, 0.0
    for version, of_version in zip(VERSIONS, models, strict=True):
        batch = make_batch([row], Staleness(max_lag=0, batch_groups=1), version.update)
        if batch.sequences:
            packs = make_packs(batch.sequences, range(len(batch.sequences)), 4096, torch.device("cpu"), Ranks())
            logp_n = PackedModel(of_version, temperature).score(packs, torch.full_like(batch.behaviour_n, torch.nan))
            count += len(logp_n)
            largest = max(largest, (logp_n - batch.behaviour_n).abs().max().item())
    return count, largest


@pytest.mark.parametrize("cut", [{}, {"top_p": 0.8, "temperature": 0.7}])
@pytest.mark.parametrize("every", [4, 1000])
@pytest.mark.parametrize("agent", [turns, branches, rewritten, side_by_side])
def test_the_learner_finds_what_was_sampled(agent, every: int, cut: dict, make_chat, row_of) -> None:
    models = [model(version, vocabulary=15) for version in VERSIONS]
    stepped = Stepped(TorchEngine(model(VERSIONS[0], 15), slots=3, max_length=256), models, every)
    sampling = Sampling(**{"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_tokens": 6, "stop_token_ids": (1,)} | cut)
    session = Session("5/0/0", 5, sampling, 77, Budget(tokens=1000, turn_tokens=6, context=256))
    conversations = Conversations(session, make_chat(), stepped.ask, max_turns=20)

    async def ask(messages: list[dict]) -> dict:
        (answer,) = await conversations.complete(Asked(messages=messages))
        return answer.message

    asyncio.run(agent(ask))
    row = row_of(session.trajectory(Episode(reward=1.0)))
    count, largest = gaps(row, models, sampling.temperature)
    assert count == session.sampled == row.loss_mask.sum() > session.turns
    assert largest <= TOLERANCE
    assert stepped.engine.gauges()["reused_tokens"] > 0
    swapped = {*row.updates[row.loss_mask.astype(bool)].tolist()}
    assert len(swapped) > 2 if every == 4 else swapped == {0}
    assert (len(row.segments) > 1) == (agent is not turns)
