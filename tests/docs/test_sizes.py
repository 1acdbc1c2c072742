"""The table of what fits where is what docs/sizes.py makes today; and every GPU deployment passes a dry run's checks."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from msgspec.structs import replace

from asyncrl.cluster import fit
from asyncrl.cluster.preflight import check_run
from asyncrl.cluster.resources import check_placement
from asyncrl.config import DataSpec, LearnerSpec, LimitsSpec, ModelSpec, Recipe, RewardSpec, SGLangSpec
from asyncrl.config.load import load_deployment
from asyncrl.rundir import RunDir

GPUS = {"gpu-1.yaml": 1, "gpu-2.yaml": 2, "gpu-8.yaml": 8, "gpu-2x8.yaml": 16}


@pytest.fixture(scope="module")
def sizes(root: Path, script: Callable[[Path], ModuleType]) -> ModuleType:
    return script(root / "docs" / "sizes.py")


def test_the_table_is_up_to_date(sizes: ModuleType) -> None:
    assert sizes.main(["--check"]) == 0, "run `python docs/sizes.py`"


def test_the_pages_name_every_deployment(root: Path, pages: dict[str, str]) -> None:
    for file in (root / "deploy").glob("*.yaml"):
        assert f"`deploy/{file.name}`" in pages["docs/deployments.md"], file.name
    assert {file.name for file in (root / "deploy").glob("gpu-*.yaml")} == set(GPUS)


@pytest.mark.parametrize(("file", "gpus"), GPUS.items())
def test_a_gpu_deployment_passes_the_checks_of_a_machine_that_has_as_many(
    sizes: ModuleType, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, gpus: int
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    deployment = load_deployment(root / "deploy" / file)
    if not deployment.ray_address:
        for index in range(gpus):
            (tmp_path / f"nvidia{index}").touch()
        monkeypatch.setattr("asyncrl.cluster.resources.metadata.version", lambda name: "2.13.0")
        assert f"{gpus} of {gpus} GPUs" in check_placement(deployment, {}, tmp_path)
    monkeypatch.setattr("asyncrl.cluster.preflight.check_placement", lambda deployment, served: "checked")
    monkeypatch.setattr(fit, "gpu_bytes", lambda: 80 << 30)
    engine = replace(deployment.generators.engine, sglang=SGLangSpec(command=(sys.executable,)))  # SGLang may not be here
    deployment = replace(deployment, generators=replace(deployment.generators, engine=engine))
    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": "1", "reward_model": {"ground_truth": ""}, "data_source": ""}))
    (tmp_path / "config.json").write_text(json.dumps(sizes.QWEN3 | sizes.MODELS["0.6B"]))
    recipe = Recipe(
        name="r",
        model=ModelSpec(path=str(tmp_path)),
        data=DataSpec(files=(f"{tmp_path}/train.jsonl",)),
        reward=RewardSpec(function="asyncrl.reward.verify:gsm8k"),
        learner=LearnerSpec(batch_groups=1),
        total_steps=1,
    )
    plan = check_run(recipe, deployment, RunDir(tmp_path / "run"))
    told = next(line for line in plan if line.startswith("learner"))
    assert ("is not known yet" in told) == bool(deployment.ray_address)
    assert f"{deployment.learner.ranks} rank" in told
    assert "policy, 0.75B" in told  # untied
    assert deployment.limits.start_timeout_s > LimitsSpec().start_timeout_s
