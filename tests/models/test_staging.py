"""Versions that several ranks stage: what they lay into one memory is the model, to the bit."""

import itertools
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from asyncrl.config import Layout, LoraSpec, ModelSpec, PrecisionSpec
from asyncrl.errors import Unavailable
from asyncrl.generate.embedded.engine import TorchEngine
from asyncrl.models.lora import add_adapters
from asyncrl.models.memory import Place, WeightMemory
from asyncrl.models.packed import PackedModel, TokenSequence, make_pack
from asyncrl.models.pieces import named_tensors
from asyncrl.models.ranks import Ranks
from asyncrl.models.sharding import shard
from asyncrl.models.staging import Staging
from asyncrl.types import GenerationRequest, Sampling, Version
from asyncrl.weights.publisher import WeightPublisher
from asyncrl.weights.subscriber import WeightSubscriber

NOWHERE = Place("", "/nowhere", b"")


def tiny(tied: bool, layers: int = 2) -> Qwen3ForCausalLM:
    """Of 30 tokens, which neither 4 ranks nor 2 × 2 divide evenly; its final norm is kept in float32."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=30,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=tied,
    )
    model = Qwen3ForCausalLM(config)
    model._keep_in_fp32_modules_strict = {"model.norm"}
    return model.eval()


def write(ranks: Ranks, staging: Staging, place: Place = NOWHERE) -> None:
    """Has all ranks write, as the learner does; the first one knows where."""
    encoded = msgspec.json.encode(place)
    told = torch.tensor([*encoded, *b" " * (256 - len(encoded))], dtype=torch.uint8)
    dist.broadcast(told, 0)
    staging.write(msgspec.json.decode(bytes(told.tolist()), type=Place))
    dist.barrier()


def staged(_: Ranks, cases: list[tuple[Layout, int]]) -> list[str]:
    """What differs from the model, tied or not, in its own dtype and cast. With each layout: how many ranks share a node."""
    wrong = []
    for (layout, near), tied in itertools.product(cases, (True, False)):
        ranks, whole, model = Ranks(layout), named_tensors(tiny(tied)), tiny(tied)
        shard(model, ranks, PrecisionSpec())
        for dtype in (None, torch.bfloat16):
            staging = Staging(model, ranks, dtype=dtype, where=f"node {ranks.index // near}")
            if not ranks.first:
                write(ranks, staging)
                continue
            found = staging.staged("weights", partial(write, ranks, staging))
            assert list(found) == list(whole)
            for name, tensor in whole.items():
                expected = tensor if dtype is None or name == "model.norm.weight" else tensor.to(dtype)
                if found[name].dtype != expected.dtype or not torch.equal(found[name], expected):
                    wrong.append(f"{layout} {near} tied={tied}: {name}")
    return wrong


TWO = [(Layout(shard=2), 2), (Layout(tp=2), 2)]
FOUR = [
    (Layout(shard=4), 4),
    (Layout(replicate=2, shard=2), 4),
    (Layout(shard=2, tp=2), 4),
    (Layout(shard=4), 2),  # of two nodes
    (Layout(shard=2, tp=2), 1),  # of four
    (Layout(replicate=2, shard=2), 2),  # the other node has a copy
]


@pytest.mark.parametrize("cases", [TWO, FOUR])
def test_what_ranks_stage_is_the_model(gang: Any, cases: list[tuple[Layout, int]]) -> None:
    assert gang(Layout(shard=cases[0][0].ranks), staged, cases)[0] == []


def adapters(ranks: Ranks) -> int:
    """How many tensors are not those of one rank, where two on different nodes both add what adapters say."""
    whole, divided = tiny(tied=True), tiny(tied=True)
    for model in (whole, divided):
        add_adapters(model, LoraSpec(rank=2), ModelSpec(path="base"), seed=0)
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
    shard(divided, ranks, PrecisionSpec())
    staging = Staging(divided, ranks, where=f"node {ranks.index}")
    if not ranks.first:
        write(ranks, staging)
        return 0
    alone = Staging(whole).staged("weights")
    return differs(staging.staged("weights", partial(write, ranks, staging)), alone)


def test_adapters_are_added_by_ranks_of_several_nodes(gang: Any) -> None:
    assert gang(Layout(shard=2), adapters) == [0, 0]


def gaps(ranks: Ranks) -> list[float]:
    """Largest distances of logprobs: of an engine in bfloat16, which got cast weights, to a learner that keeps them in float32
    and computes in bfloat16, and to one that keeps them in bfloat16; and of these two."""
    master, coarse, served = (tiny(tied=True).requires_grad_(False) for _ in range(3))
    master._keep_in_fp32_modules_strict = None
    for parameter in (*coarse.parameters(), *served.parameters()):
        parameter.data = parameter.to(torch.bfloat16)  # not the buffers, as transformers loads it
    served.model.embed_tokens.weight.zero_()  # it gets its weights over the bus
    shard(master, ranks, PrecisionSpec(compute="bfloat16"))
    engine = TorchEngine(served, slots=4, max_length=32)
    engine.update_weights(Version(1, 0), Staging(master, ranks, dtype=torch.bfloat16).staged("weights"))
    engine.start()
    sampling = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=12, stop_token_ids=())
    prompt = (3, 1, 4, 1, 5)
    asked = [GenerationRequest(id=str(n), group=0, prompt_ids=prompt, sampling=sampling, seed=n) for n in range(4)]
    answers = [future.result(60) for future in engine.submit_group(asked)]
    engine.close()
    ids = [np.array([*prompt, *answer.token_ids]) for answer in answers]
    pack = make_pack([TokenSequence(of, np.arange(len(prompt), len(of))) for of in ids], range(4))
    engines = torch.tensor([logprob for answer in answers for logprob in answer.logprobs])
    scored = [PackedModel(model).score([pack], torch.full((len(engines),), torch.nan)) for model in (master, coarse)]
    return [(one - other).abs().max().item() for one, other in itertools.combinations((engines, *scored), 2)]


def test_with_float32_masters_the_gap_is_that_of_a_learner_in_bfloat16(gang: Any) -> None:
    ((masters, coarse, between),) = gang(Layout(), gaps)
    assert between == 0
    assert masters == coarse < 0.05


def receive(_: Ranks, layouts: list[Layout]) -> list[tuple[int, int, bool]]:
    """With each layout: how many tensors changed from one of 20 versions to the next, although lr = 0; of one more, at
    which they move, how many are not the model's; and whether it moved."""
    figures = []
    for layout in layouts:
        ranks, model = Ranks(layout), tiny(tied=True, layers=1)
        shard(model, ranks, PrecisionSpec())
        optimizer, staging = torch.optim.SGD(model.parameters()), Staging(model, ranks)
        tokens, received = torch.arange(8)[None] + ranks.share, []
        publisher = WeightPublisher(1) if ranks.first else None
        subscriber = WeightSubscriber(lambda of=publisher: of.admit("generator-0"), name="receiver", poll_s=0.05)
        for update in range(21):
            optimizer.param_groups[0]["lr"] = 0.1 if update == 20 else 0.0
            model(tokens).logits.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                model(tokens)  # after which FSDP may hold gathered weights
            if publisher is None:
                write(ranks, staging)
                continue
            publisher.publish(Version(1, update), partial(staging.staged, write=partial(write, ranks, staging)))
            version, tensors = subscriber.next(received[-1][0] if received else None, 20)
            assert version.update == update
            received.append((version, {name: tensor.clone() for name, tensor in tensors.items()}))
        trained = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in named_tensors(model).items()}
        if publisher is not None:
            subscriber.close()
            publisher.close()
            *still, last = [tensors for _, tensors in received]
            changed = sum(differs(now, before) for before, now in itertools.pairwise(still))
            figures.append((changed, differs(last, trained), differs(last, still[0]) > 0))
    return figures


def differs(tensors: Mapping[str, torch.Tensor], others: Mapping[str, torch.Tensor]) -> int:
    assert tensors.keys() == others.keys()
    return sum(not torch.equal(tensors[name], others[name]) for name in tensors)


@pytest.mark.parametrize("layouts", [[Layout(shard=2), Layout(tp=2)], [Layout(shard=4)]])
def test_at_lr_0_receivers_get_the_same_weights_twenty_times(gang: Any, layouts: list[Layout]) -> None:
    assert gang(layouts[0], receive, layouts)[0] == [(0, 0, True)] * len(layouts)


def die(ranks: Ranks, told: str) -> None:
    """The second rank dies in the middle of its pieces; the first one tells what a receiver got, and what memory is open."""
    model = tiny(tied=True)
    shard(model, ranks, PrecisionSpec())
    staging = Staging(model, ranks)
    if ranks.first:
        publisher = WeightPublisher(1)
        publisher.publish(Version(1, 1), {"w": torch.ones(2)})
        subscriber = WeightSubscriber(lambda: publisher.admit("generator-0"), name="receiver", poll_s=0.05)
        version, _ = subscriber.next(None, 20)
        try:
            publisher.publish(Version(1, 2), partial(staging.staged, write=partial(write, ranks, staging)))
        except RuntimeError:
            found = subscriber.next(version, 0.5), publisher.gauges()["live_versions"]
            publisher.publish(Version(1, 2), {"w": torch.zeros(2)})  # its successor's
            Path(told).write_text(str((*found, subscriber.next(version, 20)[1]["w"].tolist())))
        return
    puts, put = iter(range(5)), WeightMemory.put
    WeightMemory.put = lambda *arguments: put(*arguments) if next(puts, None) is not None else os._exit(1)
    write(ranks, staging)


def test_of_a_version_whose_writer_dies_nothing_is_seen(gang: Any, tmp_path: Path) -> None:
    told = tmp_path / "told"
    with pytest.raises(AssertionError, match="rank 1: it died"):
        gang(Layout(shard=2), die, str(told))
    assert told.read_text() == "(None, 1.0, [0.0, 0.0])"


def test_memory_that_is_gone_is_named() -> None:
    with pytest.raises(Unavailable, match=r"rank 0: the memory of a version at /nowhere is gone, or another user's"):
        Staging(torch.nn.Linear(2, 2)).write(NOWHERE)
