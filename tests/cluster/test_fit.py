"""Which layout is taken, for models of public sizes on devices that are said to be there; and that all ranks take the same."""

import json
import threading
from pathlib import Path

import pytest

from asyncrl.cluster.fit import DeviceMemory, agree, fit_layouts
from asyncrl.config import (
    AlgorithmSpec,
    DataSpec,
    Deployment,
    Layout,
    LearnerSpec,
    LoraSpec,
    ModelSpec,
    ParallelSpec,
    PlaceSpec,
    RanksSpec,
    Recipe,
    RewardSpec,
)
from asyncrl.errors import ConfigError

QWEN3 = {"model_type": "qwen3", "vocab_size": 151_936, "head_dim": 128, "num_key_value_heads": 8}
MODELS = {
    "0.6B": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
    "8B": {"hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 36, "num_attention_heads": 32},
    "32B": {"hidden_size": 5120, "intermediate_size": 25_600, "num_hidden_layers": 64, "num_attention_heads": 64},
}
GIB = 1 << 30


@pytest.fixture
def fit(tmp_path: Path):
    """The fit of a model of MODELS on ranks with GPUs of 80 GiB."""

    def take(model: str, ranks: int, *, nodes: int = 1, gpus: int = 1, gib: int | None = 80, host: int = 2048, **fields):
        (tmp_path / "config.json").write_text(json.dumps(QWEN3 | MODELS[model] | {"tie_word_embeddings": model == "0.6B"}))
        recipe = Recipe(
            name="r",
            model=ModelSpec(path=str(tmp_path)),
            data=DataSpec(files=("a.jsonl",)),
            reward=RewardSpec(function="a:b"),
            learner=LearnerSpec(max_tokens_per_pack=fields.pop("tokens", 16_384), lora=fields.pop("lora", None)),
            algorithm=fields.pop("algorithm", AlgorithmSpec()),
            total_steps=1,
        )
        place = RanksSpec(ranks=ranks, place=PlaceSpec(gpus=gpus), parallel=ParallelSpec(**fields))
        memory = None if gib is None else gib * GIB
        devices = [DeviceMemory(node=f"{i * nodes // ranks}", memory_bytes=memory, host_bytes=host * GIB) for i in range(ranks)]
        return fit_layouts(recipe, Deployment(learner=place), {"learner": devices})["learner"]

    return take


@pytest.mark.parametrize(
    ("model", "ranks", "nodes", "layout"),
    [
        ("0.6B", 1, 1, Layout()),
        ("0.6B", 8, 1, Layout(shard=8)),
        ("0.6B", 16, 2, Layout(replicate=2, shard=8)),
        ("8B", 1, 1, Layout(checkpoint_activations=True, offload=True)),
        ("8B", 8, 1, Layout(shard=8, checkpoint_activations=True)),
        ("8B", 16, 2, Layout(replicate=2, shard=8, checkpoint_activations=True)),
        ("32B", 8, 1, Layout(shard=8, checkpoint_activations=True, offload=True)),
        ("32B", 16, 2, Layout(shard=16, checkpoint_activations=True)),
    ],
)
def test_the_cheapest_that_fits(fit, model: str, ranks: int, nodes: int, layout: Layout) -> None:
    assert fit(model, ranks, nodes=nodes).layout == layout


def test_packs_that_do_not_fit_are_shared(fit) -> None:
    long = fit("8B", 8, tokens=131_072)
    assert (long.layout.sp > 1, long.layout.checkpoint_activations, long.layout.offload) == (True, True, False)


def test_matrices_are_split_where_sharding_is_pinned_and_does_not_suffice(fit) -> None:
    assert fit("8B", 8, fsdp=2).layout == Layout(replicate=2, shard=2, tp=2, checkpoint_activations=True)


def test_what_can_not_be_divided_is_not(fit) -> None:
    """No tensor parallelism over experts: sequence parallelism is what is left for long packs."""
    MODELS["experts"] = MODELS["8B"] | {"model_type": "qwen3_moe", "num_experts": 8, "moe_intermediate_size": 1536}
    try:
        layout = fit("experts", 8, fsdp=4, tokens=131_072).layout
    finally:
        del MODELS["experts"]
    assert (layout.tp, layout.sp > 1) == (1, True)


def test_what_fits_all_of_a_memory_but_not_what_counts_is_told_as_tight(fit) -> None:
    assert fit("8B", 8, gib=40, offload=False, tp=1, sp=1).reason.endswith("147.4 GiB or more; it may not fit")
    assert "may not" not in fit("8B", 8, gib=43, offload=False, tp=1, sp=1).reason


def test_one_rank_of_a_node_loads_the_whole_model_there(fit) -> None:
    assert fit("8B", 96).layout.ranks == 96  # which all could not
    assert fit("8B", 8, host=35).layout.ranks == 8
    with pytest.raises(ConfigError, match=r"3\.8 GiB of its host's 3\.4 GiB"):
        fit("8B", 8, host=30, offload=False, tp=1, sp=1)
    with pytest.raises(ConfigError, match=r"30\.5 GiB of its host's 27\.0 GiB"):
        fit("8B", 8, nodes=8, host=30, offload=False, tp=1, sp=1)


def test_what_is_pinned_stays(fit) -> None:
    pinned = fit("0.6B", 8, tp=2, sp=2, fsdp=2, checkpoint_activations=True, offload=True).layout
    assert pinned == Layout(replicate=2, shard=1, sp=2, tp=2, checkpoint_activations=True, offload=True)


def test_the_reason_has_figures(fit) -> None:
    found = fit("8B", 8)
    assert found.reason == (
        "8 ranks, fsdp=8 tp=1 sp=1, activations checkpointed: a rank takes 38.2 GiB of the 72.0 GiB that count of its memory; "
        "whatever is cheaper takes 147.4 GiB or more"
    )
    assert [row.split() for row in found.table] == [
        ["GiB", "per", "rank", "weights", "optimizer", "gradients", "gathered", "activations", "logits"],
        ["policy,", "8.19B", "3.81", "7.63", "3.81", "12.15", "7.75", "3.04"],
    ]


def test_a_reference_adds_its_weights_and_adapters_spare_the_optimizer(fit) -> None:
    with_kl = AlgorithmSpec(kl_coef=0.1)
    assert [row.split(",")[0] for row in fit("8B", 8, algorithm=with_kl).table[1:3]] == ["policy", "reference"]
    assert len(fit("8B", 8, algorithm=with_kl, lora=LoraSpec()).table) == 2  # the reference is the model without them
    assert fit("8B", 1, lora=LoraSpec()).layout == Layout(checkpoint_activations=True)


def test_what_can_not_fit_is_refused_with_figures(fit) -> None:
    with pytest.raises(ConfigError, match=r"(?s)does not fit\. 1 rank.* would take .*of which 14\.4 GiB count.*lora"):
        fit("32B", 1, gib=16)
    assert fit("32B", 1, gib=16, memory_bytes=100 * GIB).layout.offload  # stated by who knows better


def test_without_devices_or_sizes_the_first_layout_is_told_as_such(fit, tmp_path: Path) -> None:
    unknown = fit("8B", 8, gib=None)
    assert unknown.layout == Layout(shard=8)
    assert unknown.reason.endswith("how much memory its devices have, is not known yet")
    MODELS["other"] = {"model_type": "mamba"}
    try:
        assert fit("other", 2).reason == "2 ranks, fsdp=2 tp=1 sp=1; how large the model is, is not known"
    finally:
        del MODELS["other"]


def test_ranks_agree_on_what_the_first_makes_of_all_devices() -> None:
    """Those of a node become neighbours in their group, wherever Ray put them."""

    class Store(dict):
        """As torch's: `get` waits."""

        there = threading.Condition()

        def set(self, key: str, value: bytes) -> None:
            with self.there:
                self[key] = value
                self.there.notify_all()

        def get(self, key: str) -> bytes:
            with self.there:
                assert self.there.wait_for(lambda: key in self, 10)
                return self[key]

    store, found, asked = Store(), {}, []

    def rank(index: int) -> None:
        own = DeviceMemory(node="ab"[index % 2], memory_bytes=index, host_bytes=1)

        def fit(devices):
            asked.append({group: [device.node for device in of] for group, of in devices.items()})
            return layouts

        found[index] = agree(store, index, ["learner"] * 4 + ["critic"] * 2, own, fit)

    layouts = {"learner": Layout(shard=2, tp=2), "critic": Layout(shard=2)}
    threads = [threading.Thread(target=rank, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert asked == [{"learner": ["a", "a", "b", "b"], "critic": ["a", "b"]}]
    assert {index: number for index, (number, _) in found.items()} == {0: 0, 2: 1, 1: 2, 3: 3, 4: 4, 5: 5}
    assert all(agreed == layouts for _, agreed in found.values())
