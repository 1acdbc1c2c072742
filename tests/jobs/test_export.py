import argparse
import json
import shutil
from types import SimpleNamespace

import msgspec
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast, Qwen3Config

from asyncrl.config import DataSpec, LoraSpec, ModelSpec, Recipe, RewardSpec
from asyncrl.errors import CheckpointError, ConfigError
from asyncrl.jobs.export import export_job
from asyncrl.learn.checkpoint import Checkpoints
from asyncrl.learn.policies import load, locate
from asyncrl.manifests import file_sum, verify_manifest, write_manifest
from asyncrl.models.lora import add_adapters
from asyncrl.rundir import RunDir
from asyncrl.types import Version

SMALL = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
}


@pytest.fixture(params=["qwen3-tied", "llama-untied"])
def model(request):
    torch.manual_seed(1)
    tied = request.param == "qwen3-tied"
    config = (Qwen3Config if tied else LlamaConfig)(**SMALL, head_dim=8, tie_word_embeddings=tied)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture
def run(tmp_path, model):
    """A run directory with checkpoints 0 and 1, and the model as it is at 1."""
    base, run_dir = tmp_path / "base", RunDir(tmp_path / "run").create()
    backend = Tokenizer(models.WordLevel({str(i): i for i in range(20)}, unk_token="0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="0", chat_template="{{ messages }}").save_pretrained(base)
    recipe = Recipe(
        name="r",
        model=ModelSpec(path=str(base)),
        data=DataSpec(files=("x.parquet",)),
        reward=RewardSpec(function="a.py:b"),
        total_steps=1,
    )
    run_dir.recipe.write_bytes(msgspec.json.encode(recipe))
    checkpoints, optimizer = Checkpoints(run_dir, keep_last_n=3), torch.optim.AdamW(model.parameters())
    trainer = SimpleNamespace(trained={"policy": SimpleNamespace(module=model, adamw=optimizer)}, state={})
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    checkpoints.save(trainer, Version(0, 0))
    checkpoints.wait()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    checkpoints.save(trainer, Version(0, 1))
    checkpoints.wait()
    return run_dir


def export(*argv):
    parser = argparse.ArgumentParser()
    export_job(parser)
    args = parser.parse_args(list(map(str, argv)))
    return args.job(args)


def logits(model):
    with torch.inference_mode():
        return model(torch.arange(12).view(2, 6)).logits


def test_the_newest_checkpoint_becomes_a_hugging_face_folder(run, model, tmp_path, capsys):
    out = tmp_path / "exports" / "hf"
    assert export(run.path, out) == 0
    said = capsys.readouterr()
    assert said.out == f"{out}\n"
    assert "left out, being no part of the policy: optimizer" in said.err
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out).eval()), logits(model))
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("3 14")["input_ids"] == [3, 14]
    assert tokenizer.chat_template == "{{ messages }}"
    assert [path.name for path in out.parent.iterdir()] == ["hf"]


def test_a_named_checkpoint_is_that_one(run, model, tmp_path):
    export(run.checkpoint(0), tmp_path / "hf")
    assert not torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()), logits(model))


def test_an_export_can_be_in_another_type(run, tmp_path):
    export(run.path, tmp_path / "hf", "--dtype", "bfloat16")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").dtype == torch.bfloat16


def test_nothing_is_overwritten_unasked(run, model, tmp_path):
    out = tmp_path / "hf"
    export(run.checkpoint(0), out)
    with pytest.raises(ConfigError, match="is not empty, and would be replaced; choose another folder, or add --force"):
        export(run.path, out)
    export(run.path, out, "--force")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out).eval()), logits(model))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_text("")
    with pytest.raises(ConfigError, match="no Hugging Face folder"):
        export(run.path, tmp_path / "photos", "--force")
    with pytest.raises(ConfigError, match="is a file"):
        export(run.path, tmp_path / "photos" / "cat.png")
    (tmp_path / "empty").mkdir()
    assert export(run.path, tmp_path / "empty") == 0


def test_a_damaged_newest_checkpoint_is_passed_over_but_not_when_named(run):
    (run.checkpoint(1) / "policy" / "model.safetensors").write_bytes(b"torn")
    assert locate(str(run.path)).checkpoint == run.checkpoint(0)
    with pytest.raises(CheckpointError, match=r"model\.safetensors has 4 bytes"):
        locate(str(run.checkpoint(1)))
    with pytest.raises(ConfigError, match=r"no checkpoint .*step_000007; beside it are: step_000000, step_000001"):
        locate(str(run.checkpoint(7)))
    (run.checkpoint(0) / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint of .* can be used"):
        locate(str(run.path))


def test_a_checkpoint_out_of_its_run_needs_a_tokenizer(run, tmp_path):
    moved = run.checkpoint(1).rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match="add --tokenizer"):
        locate(str(moved))
    policy = locate(str(moved), tokenizer=str(tmp_path / "base"))
    assert (policy.checkpoint, policy.recipe) == (moved, None)


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="is no model, checkpoint or run"):
        locate(str(tmp_path))
    (tmp_path / "recipe.json").write_text(json.dumps({}))
    with pytest.raises(ConfigError, match="has no checkpoint yet"):
        locate(str(tmp_path))


def test_a_checkpoint_of_a_builders_model_is_built_again_from_what_it_read(run, model, tmp_path):
    builder, base = tmp_path / "mine.py", tmp_path / "base"
    model.save_pretrained(base)
    builder.write_text(
        "from transformers import AutoModelForCausalLM\n"
        "def make(spec):\n"
        f"    assert spec.path == {str(base)!r}\n"
        "    return AutoModelForCausalLM.from_pretrained(spec.path)\n"
    )
    recipe = msgspec.json.decode(run.recipe.read_bytes(), type=Recipe)
    built = msgspec.structs.replace(recipe.model, builder=f"{builder}:make", revision="v1", dtype="bfloat16")
    run.recipe.write_bytes(msgspec.json.encode(msgspec.structs.replace(recipe, model=built)))
    spec = locate(str(run.path)).spec
    assert (spec.path, spec.revision, spec.tokenizer_revision, spec.dtype) == (str(base), "v1", "v1", "float32")
    export(run.checkpoint(0), tmp_path / "out")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(tensor * 1.5, model.state_dict()[name]) for name, tensor in back.items())
    newest, _ = load(locate(str(run.path)))
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in newest.state_dict().items())


@pytest.fixture
def adapted(run, model):
    """The run with a newest checkpoint, 2, of adapters on what its `model.path` holds."""
    base = run.path.parent / "base"
    model.save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    add_adapters(model, LoraSpec(rank=3), ModelSpec(path=str(base)), seed=0)
    torch.manual_seed(3)
    learned = [torch.nn.init.normal_(parameter) for parameter in model.parameters() if parameter.requires_grad]
    trainer = SimpleNamespace(trained={"policy": SimpleNamespace(module=model, adamw=torch.optim.AdamW(learned))}, state={})
    checkpoints = Checkpoints(run, keep_last_n=3)
    checkpoints.save(trainer, Version(0, 2))
    checkpoints.wait()
    return model


def test_adapters_are_exported_merged_and_evaluated_so(run, adapted, tmp_path):
    export(run.path, tmp_path / "hf")
    merged, base = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("hf", "base"))
    assert list(merged.state_dict()) == list(base.state_dict())
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=1e-5, atol=5e-5)
    assert not torch.allclose(logits(merged), logits(base), atol=0.1)
    assert torch.equal(logits(load(locate(str(run.path)))[0]), logits(merged))
    export(run.path, tmp_path / "half", "--dtype", "bfloat16")
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    assert all(torch.equal(p, merged.get_parameter(name).bfloat16()) for name, p in half.named_parameters())


def test_an_adapter_alone_is_one_of_pefts(run, adapted, tmp_path):
    export(run.path, tmp_path / "adapter", "--adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(adapted))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"]) == (str(tmp_path / "base"), 3)
    assert AutoTokenizer.from_pretrained(tmp_path / "adapter").chat_template


def test_adapters_without_their_base_and_what_has_none_are_refused(run, adapted, model, tmp_path):
    with pytest.raises(ConfigError, match="--dtype bfloat16 with --adapter: adapters stay in float32"):
        export(run.path, tmp_path / "out", "--adapter", "--dtype", "bfloat16")
    with pytest.raises(ConfigError, match=r"--adapter: .* has no adapter, for it was not trained with learner\.lora"):
        export(run.checkpoint(1), tmp_path / "out", "--adapter")
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(CheckpointError, match=r"has adapters of '.*base' \(float32\) as it was then"):
        export(run.path, tmp_path / "out")
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(ConfigError, match=r"base"):
        export(run.path, tmp_path / "out", "--adapter")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_several_ranks_is_put_together(run, model, tmp_path):
    folder = run.checkpoint(1)
    tensors = load_file(folder / "policy/model.safetensors")
    (folder / "policy/model.safetensors").unlink()
    for rank in (0, 1):
        halves = {name: tensor.tensor_split(2)[rank].contiguous() for name, tensor in tensors.items()}
        begins = {name: [rank * ((len(tensor) + 1) // 2), *[0] * (tensor.dim() - 1)] for name, tensor in tensors.items()}
        pieces = json.dumps({name: (tensor.shape, begins[name]) for name, tensor in tensors.items()})
        save_file(halves, folder / f"policy/model_rank_0000{rank}_of_00002.safetensors", {"pieces": pieces})
    extra = verify_manifest(run.checkpoint(0)) | {"update": 1}
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"]
    write_manifest(folder, extra, {str(file.relative_to(folder)): file_sum(file) for file in files})
    assert export(run.path, tmp_path / "out") == 0
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()), logits(model))
