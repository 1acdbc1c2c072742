"""`asyncrl merge` on shards by real FSDP1 and FSDP2, whole and broken."""

import argparse
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from asyncrl.errors import CheckpointError, ConfigError
from asyncrl.jobs.export import export_job
from asyncrl.models.loading import fingerprints

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("verl_shards.py")
CASES = ["fsdp2", "fsdp2-uneven", "fsdp2-replicated", "fsdp1", "fsdp1-replicated", "one-rank"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """What `verl_shards.py` made: a folder for each of `CASES`. Ranks are forked there, not from a process with Ray in it."""
    root = tmp_path_factory.mktemp("verl")
    done = subprocess.run([sys.executable, SCRIPT, root], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return root


@pytest.fixture
def actor(shards, tmp_path):
    """A copy of what two ranks saved, to be broken."""
    return Path(shutil.copytree(shards / "fsdp2", tmp_path / "run")) / "global_step_3" / "actor"


def merge(*argv):
    parser = argparse.ArgumentParser()
    export_job(parser)
    args = parser.parse_args(list(map(str, argv)))
    return args.job(args)


def refused(actor, error, said):
    """`merge` ends with this error, and leaves nothing behind."""
    out = actor.parents[2] / "out" / "hf"
    with pytest.raises(error, match=said):
        merge(actor, out)
    assert not out.parent.exists() or not list(out.parent.iterdir())


def bits(folder):
    return fingerprints(AutoModelForCausalLM.from_pretrained(folder, dtype="auto"))


@pytest.mark.parametrize("case", CASES)
def test_the_ranks_shards_become_the_model_to_the_bit(shards, case, tmp_path, capsys):
    assert merge(shards / case / "global_step_3" / "actor", tmp_path / "hf") == 0
    assert bits(tmp_path / "hf") == bits(shards / case / "truth")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (tokenizer("3 14")["input_ids"], tokenizer.chat_template) == ([3, 14], "{{ messages }}")
    said = capsys.readouterr()
    assert said.out == f"{tmp_path / 'hf'}\n"
    assert "left out, being no part of the policy: extra_state_world_size_" in said.err
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_step_and_a_whole_run_are_found_from_verls_own_folders(shards, actor, tmp_path, capsys):
    step, run = actor.parent, actor.parents[1]
    (step / "critic").mkdir()
    (step / "data.pt").write_bytes(b"")
    merge(step, tmp_path / "of-step")
    assert (
        "../critic, ../data.pt, extra_state_world_size_2_rank_*.pt, optim_world_size_2_rank_*.pt\n" in capsys.readouterr().err
    )
    (run / "latest_checkpointed_iteration.txt").write_text("3")
    merge(run, tmp_path / "of-run")
    assert bits(tmp_path / "of-run") == bits(tmp_path / "of-step") == bits(shards / "fsdp2" / "truth")
    (run / "latest_checkpointed_iteration.txt").write_text("4")
    with pytest.raises(
        ConfigError, match="names global_step_4, which is not there; name a step's folder yourself: global_step_3"
    ):
        merge(run, tmp_path / "none")


def test_the_dtype_is_cast_and_the_files_are_cut_on_request(shards, tmp_path):
    merge(shards / "fsdp1" / "global_step_3", tmp_path / "hf", "--dtype", "bfloat16", "--shard-gb", 1e-6)
    whole = AutoModelForCausalLM.from_pretrained(shards / "fsdp1" / "truth").bfloat16()
    assert bits(tmp_path / "hf") == fingerprints(whole)
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 2
    with pytest.raises(ConfigError, match=r"--shard-gb 0\.0"):
        merge(shards / "fsdp1" / "global_step_3", tmp_path / "other", "--shard-gb", 0)


def test_nothing_is_overwritten_unasked(shards, tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="is not empty, and would be replaced"):
        merge(shards / "fsdp1" / "global_step_3", tmp_path / "hf")
    assert (tmp_path / "hf" / "config.json").read_text() == "{}"


RANK_1 = "model_world_size_2_rank_1.pt"


def test_missing_ranks_are_named(actor):
    (actor / RANK_1).unlink()
    refused(actor, CheckpointError, r"lacks 1 of 2 ranks \(1\)")


@pytest.mark.parametrize("kept", [0, 100, -1])
def test_a_file_cut_short_is_named(actor, kept):
    (actor / RANK_1).write_bytes((actor / RANK_1).read_bytes()[:kept])
    refused(actor, CheckpointError, f"{RANK_1} is damaged or cut short")


def test_a_changed_byte_in_a_tensor_is_found(actor):
    content = (actor / RANK_1).read_bytes()
    weight = torch.load(actor / RANK_1, weights_only=True)["model.embed_tokens.weight"]._local_tensor
    at = content.index(bytes(weight.untyped_storage())[:16])
    (actor / RANK_1).write_bytes(content[:at] + b"\xff" + content[at + 1 :])
    refused(actor, CheckpointError, f"{RANK_1} is damaged or cut short .*the checksum of")


def test_saves_of_several_world_sizes_are_not_mixed(actor):
    (actor / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 2, "world_size": 4}))
    refused(actor, CheckpointError, "world sizes 2, 4: which of them belong together can't be known")
    (actor / "fsdp_config.json").unlink()  # as in older versions
    shutil.copy(actor / RANK_1, actor / "model_world_size_8_rank_1.pt")
    refused(actor, CheckpointError, "world sizes 2, 8")


def test_a_rank_of_another_save_is_found(actor, shards):
    shutil.copy(shards / "fsdp2-uneven" / "global_step_3" / "actor" / "model_world_size_3_rank_1.pt", actor / RANK_1)
    refused(actor, CheckpointError, f"{RANK_1} holds other tensors than rank 0")


def test_a_file_that_would_run_code_is_refused_unread(actor, tmp_path):
    class Code:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"model.norm.weight": Code()}, actor / RANK_1)
    refused(
        actor,
        CheckpointError,
        f"{RANK_1} holds getattr, which is no tensor: loading it might run code, so that it is not loaded",
    )
    (actor / RANK_1).write_bytes(pickle.dumps(Code()))
    refused(actor, CheckpointError, f"{RANK_1} is damaged or cut short")
    assert not (tmp_path / "ran").exists()


def test_without_a_configuration_the_architecture_is_unknown(actor):
    shutil.rmtree(actor / "huggingface")
    refused(actor, CheckpointError, r"huggingface/config.json is missing: the architecture is unknown")


def test_a_critic_is_no_policy(actor):
    config = json.loads((actor / "huggingface" / "config.json").read_text())
    (actor / "huggingface" / "config.json").write_text(json.dumps({**config, "architectures": ["Qwen3ForTokenClassification"]}))
    refused(actor, ConfigError, r"is a value model \(Qwen3ForTokenClassification\)")


def changed(actor, change):
    """Makes it the folder of one rank, which saved whole tensors, as `change` returns them."""
    for path in (*actor.glob("*.json"), *actor.glob("*.pt")):
        path.unlink()
    model = AutoModelForCausalLM.from_pretrained(actor.parents[1] / "truth")
    torch.save(change(model.state_dict()), actor / "model_world_size_1_rank_0.pt")


def test_weights_of_another_model_and_adapters_are_refused(actor):
    changed(actor, lambda tensors: {**tensors, "model.norm.bias": torch.ones(18)})
    refused(actor, CheckpointError, r"1 names differ, e.g. \['model.norm.bias'\]$")
    changed(actor, lambda tensors: {f"base_model.model.{name}": t for name, t in tensors.items()} | {"x.lora_A": torch.ones(1)})
    refused(actor, CheckpointError, "names differ.*; merge the LoRA adapter with peft first")
    changed(actor, lambda tensors: tensors | {"model.norm.weight": torch.ones(17)})
    refused(actor, CheckpointError, r"model.norm.weight: shape \(17,\), this model has \(18,\)")


def test_tensors_that_the_configuration_ties_must_be_equal(actor):
    changed(actor, lambda tensors: tensors | {"lm_head.weight": tensors["lm_head.weight"] + 1})
    refused(actor, CheckpointError, r"lm_head.weight is tied .* differs: .*\(tie_word_embeddings\)")


def test_what_transformers_would_load_otherwise_is_not_called_done(actor):
    """A tensor in another dtype than the rest is cast by whoever loads the folder: that is said, and --dtype helps."""
    changed(actor, lambda tensors: {n: t.bfloat16() if "up_proj" in n else t for n, t in tensors.items()})
    refused(
        actor, CheckpointError, r"up_proj.weight \(.*bfloat16\) comes back otherwise \(.*float32\).*ask for one with --dtype"
    )
    out = actor.parents[2] / "out"
    merge(actor, out, "--dtype", "float32")
    assert {dtype for _, dtype, _ in bits(out).values()} == {torch.float32}


def test_cases_are_those_of_the_script(script):
    assert list(script(SCRIPT).CASES) == CASES
