"""Writes the table of docs/deployments.md that says what fits where: models of three sizes under each GPU deployment.

    python docs/sizes.py            # writes the table into the page
    python docs/sizes.py --check    # exits with 1 where it is stale, and writes nothing

It is what `--dry-run` would say of devices with 80 GiB, on hosts with 256 GiB for each: estimates, not measurements.
"""

import json
import sys
import tempfile
from pathlib import Path

from asyncrl.cluster.fit import DeviceMemory, fit_layouts
from asyncrl.config import DataSpec, Deployment, LearnerSpec, LoraSpec, ModelSpec, Recipe, RewardSpec
from asyncrl.config.load import load_deployment
from asyncrl.errors import ConfigError

PAGE = Path(__file__).with_name("deployments.md")
DEPLOYMENTS = Path(__file__).resolve().parents[1] / "deploy"
BEGIN, END = "<!-- Written by `python docs/sizes.py`. -->\n", "<!-- until here -->\n"
GIB = 1 << 30
QWEN3 = {"model_type": "qwen3", "vocab_size": 151_936, "head_dim": 128, "num_key_value_heads": 8}
MODELS = {
    "0.6B": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
    "8B": {"hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 36, "num_attention_heads": 32},
    "32B": {"hidden_size": 5120, "intermediate_size": 25_600, "num_hidden_layers": 64, "num_attention_heads": 64},
}


def devices(deployment: Deployment) -> list[DeviceMemory]:
    """Those of the learner's ranks, on one node."""
    place, ranks, generators = deployment.learner.place, deployment.learner.ranks, deployment.generators
    gpus = min(8, int(ranks * place.gpus + generators.count * generators.place.gpus))
    return [DeviceMemory(node="a", memory_bytes=int(80 * GIB * min(1, place.gpus)), host_bytes=gpus * 256 * GIB)] * ranks


def cell(deployment: Deployment, model: str, lora: LoraSpec | None = None) -> str:
    """How the learner's ranks hold the model, and what each of them takes."""
    with tempfile.TemporaryDirectory() as folder:
        config = QWEN3 | MODELS[model] | {"tie_word_embeddings": model == "0.6B"}
        (Path(folder) / "config.json").write_text(json.dumps(config))
        recipe = Recipe(
            name="sizes",
            model=ModelSpec(path=folder),
            data=DataSpec(files=("train.parquet",)),
            reward=RewardSpec(function="asyncrl.reward.verify:gsm8k"),
            learner=LearnerSpec(lora=lora),
            total_steps=1,
        )
        try:
            fit = fit_layouts(recipe, deployment, {"learner": devices(deployment)})["learner"]
        except ConfigError:
            return "no" if lora else cell(deployment, model, LoraSpec())
    at, how = fit.layout, ["LoRA"] if lora else []
    how += [f"fsdp {at.shard * at.sp}"] * (at.shard * at.sp > 1) + [f"tp {at.tp}"] * (at.tp > 1) + [f"sp {at.sp}"] * (at.sp > 1)
    how += ["checkpointed"] * at.checkpoint_activations + ["offloaded"] * at.offload
    return f"{', '.join(how) or 'as it is'}: {fit.device_bytes / GIB:.0f} GiB"


def table() -> str:
    rows = [["deployment", *MODELS], ["---"] * (1 + len(MODELS))]
    for file in ("gpu-1", "gpu-2", "gpu-8", "gpu-2x8"):
        deployment = load_deployment(DEPLOYMENTS / f"{file}.yaml")
        rows.append([f"`{file}.yaml`", *(cell(deployment, model) for model in MODELS)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main(argv: list[str]) -> int:
    before, _, rest = PAGE.read_text().partition(BEGIN)
    page = before + BEGIN + "\n" + table() + "\n" + END + rest.partition(END)[2]
    if page == PAGE.read_text():
        return 0
    if argv == ["--check"]:
        print(f"{PAGE} is stale: run `python docs/sizes.py`", file=sys.stderr)
        return 1
    PAGE.write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
