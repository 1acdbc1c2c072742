"""Only the first rank of a group holds a whole model; all ranks get what one would have given them, to the bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from transformers import PreTrainedModel

from asyncrl.config import Layout, LoraSpec, ModelSpec, PrecisionSpec
from asyncrl.errors import ConfigError
from asyncrl.models import spreading
from asyncrl.models.loading import load_model
from asyncrl.models.lora import Adapters, add_adapters
from asyncrl.models.pieces import module_pieces
from asyncrl.models.ranks import Ranks
from asyncrl.models.sharding import shard
from asyncrl.models.value import value_model

MakeModel = Callable[[str], PreTrainedModel]
KINDS = ("qwen3, tied", "llama", "gpt2, tied", "phi3, by rows, positions that follow the length")
CASES = [
    ("qwen3, tied", ""),
    ("qwen3, tied", "value"),
    ("llama", "adapters"),
    ("llama", "bfloat16, adapters"),
    ("gpt2, tied", ""),
    ("phi3, by rows, positions that follow the length", ""),
]


@pytest.fixture
def folder(make: MakeModel, tmp_path: Path) -> Path:
    for name in KINDS:
        torch.manual_seed(len(name))
        make(name).save_pretrained(tmp_path / name)
    return tmp_path


def loaded(folder: Path, name: str, how: str, ranks: Ranks) -> PreTrainedModel:
    spec = ModelSpec(path=str(folder / name), dtype="bfloat16" if "bfloat16" in how else "float32")
    model = load_model(spec, ranks=ranks)
    if "adapters" in how:
        add_adapters(model, LoraSpec(rank=2), spec, 7, ranks)
    return value_model(model) if how == "value" else model


def seen(model: PreTrainedModel, ranks: Ranks) -> dict[str, Any]:
    """What a rank has of a model. Buffers also those that no file has."""
    pieces = {piece.name: (piece.local.clone(), piece.offsets) for piece in module_pieces(model, ranks)}
    return {
        "pieces": pieces,
        "buffers": dict(model.named_buffers()),
        "learns": [(name, parameter.requires_grad) for name, parameter in model.named_parameters(remove_duplicate=False)],
        "tied": model.get_output_embeddings().weight is model.get_input_embeddings().weight,
        "adapters": Adapters.of(model),
    }


def parts(ranks: Ranks, folder: Path, cases: list[tuple[str, str]]) -> list[tuple[bool, dict[str, Any]]]:
    """Whether the rank had all of the model before, and what it has of it then."""
    spreading.BUCKET_BYTES = 300  # some rows at a time, and the last ones are fewer
    found = []
    for name, how in cases if ranks.start == 0 else cases[::-1]:
        model = loaded(folder, name, how, ranks)
        whole = [not parameter.is_meta for parameter in model.parameters()]
        assert all(whole) or not any(whole)
        shard(model, ranks, PrecisionSpec())
        found.append((all(whole), seen(model, ranks)))
    return found


@pytest.mark.parametrize(
    ("layouts", "cases"),
    [
        (Layout(shard=3), CASES),
        (Layout(replicate=2, shard=2), CASES[:3]),
        (Layout(shard=2, tp=2, offload=True), [*CASES[:2], ("llama", "adapters")]),
        ({"learner": Layout(shard=2), "critic": Layout(sp=2)}, CASES[:3]),
    ],
)
def test_every_rank_gets_its_parts_and_only_the_first_has_more(gang, folder: Path, layouts, cases) -> None:
    alone = {case: seen(loaded(folder, *case, Ranks()), Ranks()) for case in cases}
    firsts = [0, 2] if isinstance(layouts, dict) else [0]
    for index, of_rank in enumerate(gang(layouts, parts, folder, cases)):
        order = cases[::-1] if len(firsts) > 1 and index >= 2 else cases
        for case, (had_all, found) in zip(order, of_rank, strict=True):
            expected = alone[case]
            assert had_all == (index in firsts)
            assert {name: found[name] for name in ("learns", "tied", "adapters")} == {
                name: expected[name] for name in ("learns", "tied", "adapters")
            }
            assert list(found["pieces"]) == list(expected["pieces"])
            for name, (local, offsets) in found["pieces"].items():
                place = tuple(slice(at, at + size) for at, size in zip(offsets, local.shape, strict=True))
                whole = expected["pieces"][name][0]
                assert local.dtype == whole.dtype, name
                assert torch.equal(local, whole[place]), name
            assert list(found["buffers"]) == list(expected["buffers"])
            assert all(torch.equal(buffer, expected["buffers"][name]) for name, buffer in found["buffers"].items())


def load(ranks: Ranks, spec: ModelSpec) -> None:
    try:
        load_model(spec, ranks=ranks)
    except ConfigError as error:
        raise AssertionError(f"{error} (said by rank {ranks.index})") from None


def test_what_can_not_be_loaded_is_said_once_by_the_first_rank(gang, folder: Path) -> None:
    spec = ModelSpec(path=str(folder / "llama"), override_config={"num_hidden_layers": 3})
    for wrong, said in (
        (spec, r"\d+ weights, e\.g\. .* are not in its files and would be random; .* \(said by rank 0\)"),
        (ModelSpec(path=str(folder / "nowhere")), r"model\.path='.*nowhere'.* \(said by rank 0\)"),
    ):
        with pytest.raises(AssertionError, match=rf"rank 0: (?s:.*){said}"):
            gang(Layout(shard=2), load, wrong)


def of_another_model(ranks: Ranks, folder: Path) -> str:
    model = load_model(ModelSpec(path=str(folder / ("llama" if ranks.first else "qwen3, tied"))), ranks=ranks)
    try:
        shard(model, ranks, PrecisionSpec())
    except (ConfigError, RuntimeError) as error:  # the first rank's collective breaks off, as nobody takes part in it
        return str(error)
    return ""


def test_files_that_differ_between_nodes_are_named(gang, folder: Path) -> None:
    _, other = gang(Layout(shard=2), of_another_model, folder)
    assert "rank 1 makes another model than the first rank, which has its weights" in other
    assert "q_norm" in other


BUILDER = """
import torch
from transformers import AutoModelForCausalLM

def make(spec):
    model = AutoModelForCausalLM.from_pretrained(spec.path, dtype=torch.float32)
    torch.nn.init.normal_(model.lm_head.weight)  # another on every rank
    return model
"""


def built(ranks: Ranks, spec: ModelSpec) -> torch.Tensor:
    torch.manual_seed(ranks.index)
    model = load_model(spec, ranks=ranks)
    shard(model, ranks, PrecisionSpec())
    return model.lm_head.weight.full_tensor()


def test_of_what_a_builder_makes_the_first_ranks_weights_count(gang, folder: Path) -> None:
    (folder / "mine.py").write_text(BUILDER)
    spec = ModelSpec(path=str(folder / "llama"), builder=f"{folder / 'mine.py'}:make")
    torch.manual_seed(0)
    expected = load_model(replace(spec)).lm_head.weight
    assert all(torch.equal(found, expected) for found in gang(Layout(shard=2), built, spec))
