"""Loading a model on several ranks of one machine: peak memory of each, and time. By the first rank for all, and by each.

Run: python tests/bench/bench_loading.py [ranks]
"""

import multiprocessing
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import Qwen3Config, Qwen3ForCausalLM

from asyncrl.config import Layout, ModelSpec, PrecisionSpec
from asyncrl.models.loading import load_model
from asyncrl.models.ranks import join, leave
from asyncrl.models.sharding import shard


def save_model(folder: str) -> float:
    """About 78M parameters, in bfloat16. Returns its MiB in float32."""
    sizes = {"hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 8, "num_attention_heads": 12}
    heads = {"num_key_value_heads": 4, "head_dim": 64}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=32_000, tie_word_embeddings=True, **sizes, **heads))
    model.bfloat16().save_pretrained(folder)
    return model.num_parameters() * 4 / 2**20


def private_mib() -> float:
    """Of this process; of pages that it shares, its share."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss_Anon:")) / 1024


def rank(index: int, ranks: int, folder: str, how: str, results: Any) -> None:
    torch.set_num_threads(1)
    spec = ModelSpec(path=folder, dtype="float32")
    of = join(dist.FileStore(f"{folder}/store-{how}", ranks), index, Layout(shard=ranks), device="cpu", timeout_s=300)
    before, peak, over = private_mib(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.002):
            peak = max(peak, private_mib())

    watcher = threading.Thread(target=watch)
    dist.barrier()
    watcher.start()
    began = time.perf_counter()
    model = load_model(spec) if how == "each" else load_model(spec, ranks=of)
    shard(model, of, PrecisionSpec())
    dist.barrier()
    seconds = time.perf_counter() - began
    over.set()
    watcher.join()
    results.put((index, peak - before, private_mib() - before, seconds))
    leave()


def main(ranks: int) -> None:
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        print(f"{save_model(folder):.0f} MiB in float32, {ranks} ranks\n")
        print("| loaded by | peak MiB of each rank | sum | MiB of each rank then | s |\n| --- | --- | --- | --- | --- |")
        for how in ("each", "the first"):
            results = context.Queue()
            processes = [context.Process(target=rank, args=(i, ranks, folder, how, results)) for i in range(ranks)]
            for process in processes:
                process.start()
            found = sorted(results.get(timeout=300) for _ in processes)
            for process in processes:
                process.join()
            peaks, rests = (", ".join(f"{row[column]:.0f}" for row in found) for column in (1, 2))
            total, seconds = sum(row[1] for row in found), max(row[3] for row in found)
            print(f"| {how} | {peaks} | {total:.0f} | {rests} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 4)
