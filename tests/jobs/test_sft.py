"""`asyncrl sft` on a tiny model: what it writes, what repeats to the bit, what it refuses."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from asyncrl.cli import main
from asyncrl.config import DemonstrationsSpec, LoraSpec, ModelSpec, OptimizerSpec, SFTSpec
from asyncrl.errors import ConfigError, DataError
from asyncrl.jobs.sft import train
from asyncrl.learn.sft import SupervisedTrainer, fit
from asyncrl.models.packed import TokenSequence

SUMS = [(left, right) for left in range(4) for right in range(5)]


@pytest.fixture
def demonstrations(tmp_path):
    rows = [
        {"prompt": [{"role": "user", "content": f"{a}+{b}="}], "extra_info": {"answer": str(a + b)}, "chat": None}
        for a, b in SUMS
    ]
    for row in rows:
        row["chat"] = [*row["prompt"], {"role": "assistant", "content": row["extra_info"]["answer"]}]
    path = tmp_path / "demos.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def make_spec(tmp_path, tiny_model, demonstrations):
    def make(out="out", heldout=(), **changes):
        data = DemonstrationsSpec(files=(str(demonstrations),), heldout=heldout, response_key="extra_info.answer")
        fields = {"data": data, "batch": 8, "steps": 6, "lr": 3e-3, "save_freq": 2, "device": "cpu"} | changes
        return SFTSpec(model=ModelSpec(path=str(tiny_model)), out=str(tmp_path / out), **fields)

    return make


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "time"} for line in lines]


def test_the_command_trains_writes_and_tells(tiny_model, demonstrations, tmp_path, capsys):
    out = tmp_path / "made" / "warm"
    arguments = ["sft", str(tiny_model), str(out), "--data", str(demonstrations), "--heldout", str(demonstrations)]
    overrides = ["data.response_key=extra_info.answer", "epochs=3", "batch=8", "lr=3e-3", "warmup_steps=2", "eval_freq=4"]
    assert main([*arguments, *overrides, "device=cpu"]) == 0
    printed = capsys.readouterr()
    [line] = printed.out.splitlines()
    told = json.loads(line)
    # 3 epochs of 20 examples in batches of 8: 7.5 steps, the last batch filled up
    assert (told["out"], told["steps"], told["examples"], told["too_long"]) == (str(out), 8, 20, 0)
    assert told["last_heldout_loss"] < 0.8 * told["first_heldout_loss"]
    # every answer has one digit and the stop token
    assert "20 examples (0 too long) with 40 tokens to learn; 8 steps on cpu" in printed.err
    assert "step 8/8 · loss " in printed.err

    # the same by hand, with the learner's parts
    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(tiny_model)
    encoded = [(tokenizer.encode(f"<user>{a}+{b}=<assistant>"), tokenizer.encode(f"{a + b}<eos>")) for a, b in SUMS]
    examples = [TokenSequence(np.array(p + r), np.arange(len(p), len(p + r))) for p, r in encoded]
    spec = OptimizerSpec(lr=3e-3, warmup_steps=2, lr_schedule="cosine", min_lr_ratio=0.1)
    trainer = SupervisedTrainer(model, spec, 8, max_tokens_per_pack=2048)
    fit(trainer, examples, batch=8)
    made = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert all(torch.equal(tensor, made[name]) for name, tensor in model.state_dict().items())
    assert told["last_heldout_loss"] == pytest.approx(trainer.loss(examples), rel=1e-6)

    lines = metrics(tmp_path / "made" / "warm.sft")
    assert [line["step"] for line in lines] == list(range(9))
    assert [line["step"] for line in lines if "heldout/loss" in line] == [0, 4, 8]
    assert lines[1]["train/lr"] == pytest.approx(1.5e-3)  # half-way through the warm-up
    assert [path.name for path in out.parent.iterdir() if path.name.startswith(".")] == []
    assert not (tmp_path / "made" / "warm.sft" / "checkpoints").exists()


def test_conversations_teach_the_same_as_prompts_with_responses(make_spec, demonstrations, tmp_path):
    train(make_spec("a"))
    chat = DemonstrationsSpec(files=(str(demonstrations),), messages_key="chat")
    train(make_spec("b", data=chat))
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    train(make_spec("c", data=chat, seed=1))
    assert weights(tmp_path / "a") != weights(tmp_path / "c")


class Killed(Exception):
    pass


def killed_at(last):
    def observe(step, total, metrics):
        if step == last:
            raise Killed

    return observe


def test_with_lora_adapters_learn_resume_and_end_in_an_ordinary_folder(make_spec, demonstrations, tiny_model, tmp_path):
    fields = {"heldout": (str(demonstrations),), "lora": LoraSpec(rank=4), "lr": 3e-2}
    whole = train(make_spec("whole", **fields))
    assert whole.last_heldout_loss < 0.8 * whole.first_heldout_loss
    with pytest.raises(Killed):
        train(make_spec("parted", **fields), observe=killed_at(5))
    train(make_spec("parted", **fields), resume=True)
    assert weights(tmp_path / "parted") == weights(tmp_path / "whole")
    made, base = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (tmp_path / "whole", tiny_model))
    assert list(made) == list(base)
    moved = {name for name in made if not torch.equal(made[name], base[name])}
    assert moved == {name for name in base if name.endswith("proj.weight")}


def test_what_was_interrupted_resumes_to_the_bit(make_spec, demonstrations, tmp_path):
    heldout = (str(demonstrations),)
    whole = train(make_spec("whole", heldout))
    spec, work = make_spec("parted", heldout), tmp_path / "parted.sft"
    with pytest.raises(ConfigError, match="nothing to resume"):
        train(spec, resume=True)
    with pytest.raises(Killed):
        train(spec, observe=killed_at(5))  # the checkpoint of step 4 is there
    assert not (tmp_path / "parted").exists()
    with pytest.raises(ConfigError, match=r"unfinished warm start, which would be lost: go on with --resume, or start over"):
        train(spec)
    with pytest.raises(ConfigError, match=r"was begun with lr=0\.003: to resume to the bit repeat that"):
        train(make_spec("parted", heldout, lr=1e-3), resume=True)
    kept = demonstrations.read_text()
    demonstrations.write_text(kept.replace('"4"', '"5"'))
    with pytest.raises(ConfigError, match=r"demos\.jsonl or the tokenizer changed since the checkpoint of step 4"):
        train(spec, resume=True)
    demonstrations.write_text(kept)
    steps = []
    again = train(spec, resume=True, observe=lambda step, total, metrics: steps.append(step))
    assert steps == [5, 6]
    assert weights(tmp_path / "parted") == weights(tmp_path / "whole")
    assert metrics(work) == metrics(tmp_path / "whole.sft")  # step 5 is there once
    assert (again.loss, again.first_heldout_loss) == (whole.loss, whole.first_heldout_loss)


def test_force_replaces_a_result_and_nothing_else_does(make_spec, tmp_path):
    train(make_spec(steps=1))
    first = weights(tmp_path / "out")
    with pytest.raises(ConfigError, match="would be replaced; choose another folder, or add --force"):
        train(make_spec())
    train(make_spec(steps=2), force=True)
    assert weights(tmp_path / "out") != first
    assert [line["step"] for line in metrics(tmp_path / "out.sft")] == [1, 2]


def test_examples_longer_than_the_model_or_the_bound_are_left_out(make_spec, demonstrations):
    with demonstrations.open("a") as file:
        for length in (5, 70):  # the model knows 64 positions
            file.write(json.dumps({"prompt": "1" * length, "extra_info": {"answer": "2"}}) + "\n")
    assert train(make_spec("a", steps=1)).too_long == 1
    short = DemonstrationsSpec(files=(str(demonstrations),), response_key="extra_info.answer", max_length=6)
    # a sum has 6 tokens, its turns among them, and 8 with the answer and the stop token; the five ones have 7
    with pytest.raises(DataError, match=r"all 22 examples are longer than 6 tokens \(the shortest has 7\)"):
        train(make_spec("b", data=short))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 1}, r"epochs=1 and steps=6: it is not clear how long"),
        ({"batch": 0}, r"batch=0 < 1"),
        ({"lr": 0.0}, r"lr=0\.0 <= 0"),
        ({"save_freq": 0}, r"save_freq=0 < 1; use null"),
        ({"warmup_steps": -1}, r"warmup_steps=-1 < 0"),
        ({"out": ""}, r"out='': the trained policy would be lost"),
    ],
)
def test_a_spec_that_cannot_work_is_refused(changes, message):
    fields = {"model": ModelSpec(path="m"), "data": DemonstrationsSpec(files=("f",)), "out": "o", "steps": 6}
    with pytest.raises(ConfigError, match=message):
        SFTSpec(**(fields | changes))
