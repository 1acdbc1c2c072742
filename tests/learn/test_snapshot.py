"""What ranks save and load together, over real process groups: from any layout to any other."""

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from asyncrl.config import Layout, LoraSpec, ModelSpec, OptimizerSpec, PrecisionSpec
from asyncrl.errors import DiskFull
from asyncrl.learn import snapshot, together
from asyncrl.learn.checkpoint import Checkpoints
from asyncrl.learn.parallel.rank import Rank
from asyncrl.learn.sft import SupervisedTrainer
from asyncrl.manifests import verify_manifest
from asyncrl.models.lora import add_adapters, merge_adapters
from asyncrl.models.packed import TokenSequence
from asyncrl.models.pieces import adamw_pieces, module_pieces, written
from asyncrl.models.ranks import Ranks
from asyncrl.models.sharding import shard
from asyncrl.rundir import RunDir
from asyncrl.types import Version

SIZES = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LAYOUTS = {
    "one": Layout(),
    "fsdp 2": Layout(shard=2),
    "tp 2": Layout(tp=2),
    "fsdp 3": Layout(shard=3),
    "hsdp 2 x 2": Layout(replicate=2, shard=2),
    "fsdp 2 x tp 2": Layout(shard=2, tp=2),
}


def made(ranks: Ranks, seed: int = 0) -> SupervisedTrainer:
    """Tied, and nothing in it divides evenly over three ranks. The same seed gives all ranks the same."""
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(Qwen3Config(head_dim=8, num_key_value_heads=2, tie_word_embeddings=True, **SIZES)).eval()
    shard(model, ranks, PrecisionSpec())
    trainer = SupervisedTrainer(model, OptimizerSpec(lr=1e-2, eps=1e-2), 9, max_tokens_per_pack=20, ranks=ranks)
    trainer.state["figure"] = 0.0
    return trainer


def train(trainer: SupervisedTrainer, steps: range) -> None:
    for step in steps:
        rng = np.random.default_rng(step)
        trainer.step([TokenSequence(rng.integers(0, 32, 9), np.arange(3, 9)) for _ in range(4)], step)
        trainer.state["figure"] += 1


def parts(trainer: SupervisedTrainer, ranks: Ranks) -> list[tuple]:
    pieces = [*module_pieces(trainer.model, ranks), *adamw_pieces(trainer.trained["policy"].adamw, trainer.model, ranks)]
    return [(piece.name, piece.local.clone(), piece.shape, piece.offsets) for piece in written(pieces)]


def whole(of_ranks: list[list[tuple]]) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for name, local, shape, offsets in (part for of_rank in of_ranks for part in of_rank):
        block = tensors.setdefault(name, torch.full(shape, torch.nan))
        for dim, (start, length) in enumerate(zip(offsets, local.shape, strict=True)):
            block = block.narrow(dim, start, length)
        block.copy_(local)
    return tensors


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def go_on(ranks: Ranks, root: Path, sources: list[str], own: str):
    """What is saved by this layout; then by source what was loaded, what five steps made of it, and random numbers drawn."""
    found = {}
    if own:
        trainer, checkpoints = made(ranks), Checkpoints(RunDir(root / own), 2, ranks=ranks)
        train(trainer, range(3))
        torch.manual_seed(100 + ranks.index)
        checkpoints.save(trainer, Version(1, 3))
        drawn, before = torch.rand(1).item(), parts(trainer, ranks)
        train(trainer, range(3, 8))  # while it is written
        checkpoints.wait()
        found["saved"] = before, parts(trainer, ranks), drawn
        ranks.sum_(torch.zeros(1))  # the first rank's is whole
    for source in sources:
        trainer, checkpoints = made(ranks, seed=9), Checkpoints(RunDir(root / source), 2, ranks=ranks)
        checkpoints.load(trainer, 3)
        drawn = torch.rand(1).item()
        loaded = parts(trainer, ranks)
        assert trainer.state == {"figure": 3.0}
        train(trainer, range(3, 8))
        found[source] = loaded, parts(trainer, ranks), drawn
    return found


@pytest.mark.slow
def test_layouts_go_on_from_each_other(gang, tmp_path: Path) -> None:
    own: dict[str, tuple] = {}
    for name in (*LAYOUTS, "one", "fsdp 2"):  # the last two load what all have saved
        first = name not in own
        some = [source for source in ("one", "fsdp 2") if source in own and source != name]
        arguments = tmp_path, [*some, name] if first else list(own), name if first else ""
        of_ranks = [go_on(Ranks(), *arguments)] if name == "one" else gang(LAYOUTS[name], go_on, *arguments)
        results = {key: tuple(whole([r[key][i] for r in of_ranks]) for i in (0, 1)) for key in of_ranks[0]}
        draws = {key: [r[key][2] for r in of_ranks] for key in of_ranks[0]}
        if first:
            own[name] = results.pop("saved")
            assert verify_manifest(RunDir(tmp_path / name).checkpoint(3))["update"] == 3
            assert draws["saved"] == draws[name]
            assert equal(results[name][1], own[name][1]), name  # the same layout, to the bit
        for source, (loaded, trained) in results.items():
            assert equal(loaded, own[source][0]), f"{source} -> {name}"
            for tensor, value in own["one"][1].items():
                scale = value.abs().max().clamp(min=1e-3)
                apart = ((trained[tensor] - value).abs().max() / scale).item()
                assert apart <= 1e-5, f"{source} -> {name}: {tensor}"  # 2e-6 on CPUs with AVX2
    files = sorted(path.name for path in (RunDir(tmp_path / "fsdp 3").checkpoint(3) / "policy").iterdir())
    assert files[2:] == [f"model_rank_0000{rank}_of_00003.safetensors" for rank in range(3)]


class TwoModels:
    """A trainer of a policy and a critic, of which this rank has what its group holds."""

    def __init__(self, ranks: Ranks, seed: int = 0) -> None:
        models = {"policy": "learner", "critic": "critic"}
        self.each = {name: made(ranks, seed + i) for i, (name, of) in enumerate(models.items()) if ranks.holds(of)}
        self.trained = {name: of.trained["policy"] for name, of in self.each.items()}
        self.state = {"figure": 0.0}

    def parts(self, ranks: Ranks) -> list[tuple]:
        return [(f"{of}.{name}", *rest) for of, trainer in self.each.items() for name, *rest in parts(trainer, ranks)]


def save_and_load_beside(ranks: Ranks, root: Path) -> tuple[list[tuple], list[tuple], list[float]]:
    """What is saved, what comes back from another layout's checkpoint, and the random numbers drawn after each."""
    trainer, checkpoints, name = TwoModels(ranks), Checkpoints(RunDir(root / "own"), 2, ranks=ranks), Version(1, 2)
    for of in trainer.each.values():
        train(of, range(2))
    torch.manual_seed(100 + ranks.index)
    checkpoints.save(trainer, name)
    drawn = [torch.rand(1).item()]
    saved = trainer.parts(ranks)
    checkpoints.wait()
    Checkpoints(RunDir(root / "one"), 2, ranks=ranks).load(loaded := TwoModels(ranks, seed=9), 2)
    return saved, loaded.parts(ranks), [*drawn, torch.rand(1).item()]


def test_models_with_ranks_of_their_own_go_on_from_one_rank_and_back(gang, tmp_path: Path) -> None:
    one = TwoModels(Ranks())
    for of in one.each.values():
        train(of, range(2))
    Checkpoints(RunDir(tmp_path / "one"), 2).save(one, Version(1, 2))
    found = gang({"learner": Layout(shard=2), "critic": Layout()}, save_and_load_beside, tmp_path)
    saved, loaded, drawn = ([of_rank[i] for of_rank in found] for i in range(3))
    assert equal(whole(loaded), whole([one.parts(Ranks())]))
    folder = RunDir(tmp_path / "own").checkpoint(2)
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*"))
    assert [name for name in names if "critic" in name or "rng" in name] == [
        "critic/model.safetensors",
        "optimizer/critic/adamw.safetensors",
        *(f"rng/rng_rank_0000{rank}_of_00003.safetensors" for rank in range(3)),
        "scheduler/critic.json",
    ]
    assert verify_manifest(folder)["model"]["parameters"] > 0
    back = TwoModels(Ranks(), seed=9)
    Checkpoints(RunDir(tmp_path / "own"), 2).load(back, 2)
    assert equal(whole([back.parts(Ranks())]), whole(saved))
    assert torch.rand(1).item() == drawn[0][0]


def save_and_die(ranks: Ranks, root: Path, victim: int) -> None:
    trainer, checkpoints = made(ranks), Checkpoints(RunDir(root), 5, ranks=ranks)
    together.TIMEOUT_S = 1.0
    train(trainer, range(1))
    checkpoints.save(trainer, Version(1, 1))
    checkpoints.wait()
    if ranks.index == victim:
        writing, files = snapshot.save_file, []

        def kill_in_the_middle(*arguments) -> None:
            files.append(arguments)
            if len(files) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            writing(*arguments)

        snapshot.save_file = kill_in_the_middle
    checkpoints.save(trainer, Version(1, 2))
    checkpoints.wait()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_in_the_middle_of_a_save_leaves_the_one_before(gang, tmp_path: Path, victim: int) -> None:
    run_dir = RunDir(tmp_path)
    with pytest.raises(AssertionError, match=f"rank {victim}: it died|wait timeout"):
        gang(Layout(shard=2), save_and_die, tmp_path, victim)
    assert [folder.name for folder in run_dir.steps()] == ["step_000001"]
    checkpoints = Checkpoints(run_dir, 5)
    assert checkpoints.choose() == 1
    checkpoints.discard_after(1)
    assert [entry.name for entry in run_dir.checkpoints.iterdir()] == ["step_000001"]
    checkpoints.load(trainer := made(Ranks()), 1)
    assert trainer.state == {"figure": 1.0}


def save_on_a_full_disk(ranks: Ranks, root: Path) -> str:
    trainer, checkpoints = made(ranks), Checkpoints(RunDir(root), 5, ranks=ranks)
    if ranks.index == 1:

        def full(*arguments) -> None:
            Path("/dev/full").write_bytes(b"no room")

        snapshot.save_file = full
    checkpoints.save(trainer, Version(1, 1))
    with pytest.raises((DiskFull, OSError), match="No space left on device") as raised:
        checkpoints.wait()
    return raised.type.__name__


def test_a_full_disk_of_one_rank_is_named_by_the_first(gang, tmp_path: Path) -> None:
    assert gang(Layout(shard=2), save_on_a_full_disk, tmp_path) == ["DiskFull", "OSError"]
    assert list(RunDir(tmp_path).checkpoints.iterdir()) == []


def go_on_with_adapters(ranks: Ranks, root: Path, load: bool) -> dict[str, torch.Tensor]:
    """Two steps and a save, or what was saved and two further steps: the adapters, whole."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    add_adapters(model, LoraSpec(rank=4), ModelSpec(path="base"), seed=int(load))
    shard(model, ranks, PrecisionSpec())
    trainer = SupervisedTrainer(model, OptimizerSpec(lr=1e-2, eps=1e-3), 9, max_tokens_per_pack=16, ranks=ranks)
    checkpoints = Checkpoints(RunDir(root), 2, ranks=ranks)
    if load:
        checkpoints.load(trainer, 2)
    rng = np.random.default_rng(0)
    batches = [[TokenSequence(rng.integers(0, 32, 9), np.arange(3, 9)) for _ in range(4)] for _ in range(4)]
    for done in (2, 3) if load else (0, 1):
        trainer.step(batches[done], done)
    if not load:
        checkpoints.save(trainer, Version(1, 2))
        trainer.step(batches[2], 2)
        trainer.step(batches[3], 3)
        checkpoints.wait()
    return {name: p.full_tensor() if isinstance(p, DTensor) else p.detach() for name, p in learned(model)}


def learned(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def test_adapters_of_two_ranks_go_on_on_one_and_under_tensor_parallelism(gang, tmp_path: Path) -> None:
    expected = go_on_with_adapters(Ranks(), tmp_path / "one", False)
    found = gang(Layout(shard=2), go_on_with_adapters, tmp_path / "two", False)
    assert len(list((RunDir(tmp_path / "two").checkpoint(2) / "policy").glob("model_rank_*"))) == 2
    found += [go_on_with_adapters(Ranks(), tmp_path / "two", True)]
    found += gang(Layout(tp=2), go_on_with_adapters, tmp_path / "two", True)
    for adapters in found:
        assert adapters.keys() == expected.keys()
        for name, value in expected.items():
            assert (adapters[name] - value).abs().max() <= 2e-6 * value.abs().max(), name


def export_sharded(ranks: Ranks, root: Path, model: PreTrainedModel) -> None:
    shard(model, ranks, PrecisionSpec())
    rank = Rank(SimpleNamespace(model=model, packs=0), Checkpoints(RunDir(root), 1, ranks=ranks), Tokenizer(), ranks)
    for name in ("first", "second"):
        rank.export(str(root / name))
    ranks.sum_(torch.zeros(1))  # until the first rank has ended


class Tokenizer:
    def save_pretrained(self, folder: Path) -> None:
        (Path(folder) / "tokenizer.json").write_text("{}")


def test_ranks_export_together_what_one_would(gang, make_model, tmp_path: Path) -> None:
    model = make_model()
    gang(Layout(shard=3), export_sharded, tmp_path, model)
    for name in ("first", "second"):
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == [
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
        ]
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert equal(dict(exported.state_dict()), dict(model.state_dict()))


def test_ranks_export_adapters_merged(gang, make_model, tmp_path: Path) -> None:
    add_adapters(model := make_model(), LoraSpec(rank=2), ModelSpec(path="base"), seed=0)
    for _, parameter in learned(model):
        torch.nn.init.normal_(parameter, std=0.1)
    gang(Layout(shard=2), export_sharded, tmp_path, model)
    merge_adapters(model)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "second").state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=2e-6, atol=1e-7)
