"""A warm start on several ranks: processes of this machine, over gloo."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from asyncrl.config import DemonstrationsSpec, LoraSpec, ModelSpec, ParallelSpec, SFTSpec
from asyncrl.errors import ActorFailed, ConfigError
from asyncrl.jobs import local_ranks
from asyncrl.jobs.sft import train
from asyncrl.processes import OwnedProcess

pytestmark = pytest.mark.slow


@pytest.fixture
def make_spec(tmp_path, tiny_model):
    demonstrations = tmp_path / "demos.jsonl"
    sums = [(left, right) for left in range(4) for right in range(5)]
    demonstrations.write_text("".join(json.dumps({"prompt": f"{a}+{b}=", "response": str(a + b)}) + "\n" for a, b in sums))

    def make(out, **changes):
        data = DemonstrationsSpec(files=(str(demonstrations),), heldout=(str(demonstrations),))
        fields = {"data": data, "batch": 8, "steps": 6, "lr": 3e-3, "save_freq": 2, "device": "cpu"} | changes
        return SFTSpec(model=ModelSpec(path=str(tiny_model)), out=str(tmp_path / out), **fields)

    return make


def figures(spec):
    lines = [json.loads(line) for line in Path(f"{spec.out}.sft/metrics.jsonl").read_text().splitlines()]
    return torch.tensor([[line["train/loss"], line["train/grad_norm"]] for line in lines if "train/loss" in line])


def test_ranks_learn_what_one_learns(make_spec):
    one, two = make_spec("one"), make_spec("two", ranks=2)
    alone, together = train(one), train(two)
    torch.testing.assert_close(figures(two), figures(one), rtol=1e-4, atol=0)
    assert together.last_heldout_loss == pytest.approx(alone.last_heldout_loss, rel=1e-4)
    assert together.last_heldout_loss < together.first_heldout_loss
    made, expected = (AutoModelForCausalLM.from_pretrained(spec.out) for spec in (two, one))
    ids = torch.arange(1, 12)[None]
    torch.testing.assert_close(made(ids).logits, expected(ids).logits, rtol=0, atol=1e-3)
    assert made.config.architectures == expected.config.architectures


def test_a_rank_that_dies_is_named_and_the_others_go_on_from_the_last_checkpoint(make_spec, monkeypatch):
    started: list[OwnedProcess] = []

    class Seen(OwnedProcess):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            started.append(self)

    def kill_one(step: int, total: int, metrics: dict[str, float]) -> None:
        if step == 4 and len(started) == 1:
            os.kill(started[0].pid, signal.SIGKILL)

    lora = LoraSpec(rank=4, alpha=8.0)
    train(make_spec("whole", ranks=2, lora=lora))
    spec = make_spec("cut", ranks=2, lora=lora)
    monkeypatch.setattr(local_ranks, "OwnedProcess", Seen)
    with pytest.raises(ActorFailed, match=r"rank 1 ended with exit code -9; its log is .*/cut\.sft/rank-1\.log"):
        train(spec, observe=kill_one)
    train(spec, resume=True)
    assert (figures(spec) == figures(make_spec("whole"))).all()


def test_a_rank_that_can_not_start_is_named(make_spec, monkeypatch):
    monkeypatch.setattr(local_ranks.sys, "executable", "/bin/false")
    with pytest.raises(ActorFailed, match=r"rank 1 ended with exit code 1; its log is"):
        train(make_spec("out", ranks=2))


def test_parts_that_make_up_no_group_are_refused(make_spec):
    with pytest.raises(ConfigError, match="tp=2"):
        make_spec("out", ranks=3, parallel=ParallelSpec(tp=2))
