"""`python verl_shards.py ROOT`: shards as verl's checkpoint manager writes them, by real FSDP1 and FSDP2 in forked gloo ranks.

ROOT/<case>/truth is the whole model; ROOT/<case>/global_step_3/actor what the ranks saved of it.
"""

import json
import os
import sys
import traceback
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    ShardedOptimStateDictConfig,
    ShardedStateDictConfig,
    ShardingStrategy,
    StateDictType,
    fully_shard,
)
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config

# No size divides by 4, and norms of heads have 2 elements: fewer than 3 ranks.
SIZES = {
    "vocab_size": 21,
    "hidden_size": 18,
    "intermediate_size": 33,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 2,
}
CASES = {  # FSDP's version, mesh, tied, dtype
    "fsdp2": (2, (2,), True, torch.float32),
    "fsdp2-uneven": (2, (3,), False, torch.bfloat16),
    "fsdp2-replicated": (2, (2, 2), True, torch.bfloat16),
    "fsdp1": (1, (2,), True, torch.float32),
    "fsdp1-replicated": (1, (2, 2), False, torch.float32),
    "one-rank": (1, (1,), True, torch.float32),
}


def make_model(tied: bool, dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(1)
    config = Qwen3Config if tied else LlamaConfig
    return AutoModelForCausalLM.from_config(config(**SIZES, tie_word_embeddings=tied), dtype=dtype)


def make_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({str(i): i for i in range(SIZES["vocab_size"])}, unk_token="0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="0", chat_template="{{ messages }}")


def save_rank(folder: Path, version: int, sizes: tuple[int, ...], model: PreTrainedModel, rank: int, world: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder.parents[1]}/store", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("ddp", "fsdp")[-len(sizes) :])
    if version == 2:
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        tensors = model.state_dict()
    else:
        strategy = ShardingStrategy.HYBRID_SHARD if len(sizes) == 2 else ShardingStrategy.FULL_SHARD
        wrapped = FullyShardedDataParallel(
            model, device_mesh=mesh, sharding_strategy=strategy, use_orig_params=False, device_id=torch.device("cpu")
        )
        kinds = StateDictType.SHARDED_STATE_DICT, ShardedStateDictConfig(), ShardedOptimStateDictConfig()
        with FullyShardedDataParallel.state_dict_type(wrapped, *kinds):
            tensors = wrapped.state_dict()
    torch.save(tensors, folder / f"model_world_size_{world}_rank_{rank}.pt")
    for kind in ("optim", "extra_state"):
        torch.save({}, folder / f"{kind}_world_size_{world}_rank_{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def main(root: Path) -> None:
    for name, (version, sizes, tied, dtype) in CASES.items():
        folder = root / name / "global_step_3" / "actor"
        folder.mkdir(parents=True)
        model, world = make_model(tied, dtype), torch.Size(sizes).numel()
        model.save_pretrained(root / name / "truth")
        model.config.save_pretrained(folder / "huggingface")
        make_tokenizer().save_pretrained(folder / "huggingface")
        (folder / "fsdp_config.json").write_text(json.dumps({"FSDP_version": version, "world_size": world}))
        ranks = []
        for rank in range(world):
            if (pid := os.fork()) == 0:
                try:
                    save_rank(folder, version, sizes, model, rank, world)
                    os._exit(0)
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
            ranks.append(pid)
        if any(os.waitpid(pid, 0)[1] for pid in ranks):
            raise SystemExit(f"{name}: a rank failed")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
