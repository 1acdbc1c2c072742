"""The kinds of engines: what the plan of a run says of them, and what the doctor says of this machine."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
from transformers import PreTrainedModel

from asyncrl.config import Deployment, EngineSpec, GeneratorsSpec, LimitsSpec, ModelSpec, PlaceSpec, SGLangSpec
from asyncrl.config.deployment import ENGINES, EngineName
from asyncrl.errors import ConfigError
from asyncrl.generate.engines import EngineKind, EngineSite, engine_kind
from asyncrl.generate.sglang.build import launch_command
from asyncrl.generate.sglang.sglang_kind import SGLangKind
from asyncrl.report.findings import Finding
from asyncrl.types import GenerationRequest


def deployment(sglang: SGLangSpec, count: int = 1, ray_address: str = "", limits: LimitsSpec = LimitsSpec()) -> Deployment:
    engine = EngineSpec(kind="sglang", update_mode="drain", sglang=sglang)
    return Deployment(ray_address=ray_address, generators=GeneratorsSpec(count=count, engine=engine), limits=limits)


def row(name: str, kind: EngineKind) -> Finding:
    """A row of the doctor."""
    return {check: look() for check, look, _ in kind.machine_checks()}[name]


def test_every_kind_that_a_deployment_may_name_is_found() -> None:
    assert set(get_args(EngineName)) == ENGINES.keys()
    assert all(engine_kind(name).machine_checks() for name in ENGINES)


def test_each_kind_builds_an_engine_as_the_deployment_says(
    tmp_path: Path, make_model: Callable[..., PreTrainedModel], make_request: Callable[..., GenerationRequest]
) -> None:
    make_model().save_pretrained(tmp_path)
    model = ModelSpec(path=str(tmp_path), dtype="float32")
    for kind, sglang in (("torch", SGLangSpec()), ("sglang", SGLangSpec(urls=("http://127.0.0.1:1",)))):
        spec = EngineSpec(kind=kind, slots=3, max_length=40, sglang=sglang)
        site = EngineSite(generators=GeneratorsSpec(engine=spec), model=model, name="generator-0", logs=tmp_path)
        engine = engine_kind(kind).build(site)
        assert (engine.slots, engine.version) == (3, None)
        with pytest.raises(ConfigError, match=r"max_tokens=38 > engine\.max_length=40"):
            engine.submit_group([make_request(max_tokens=38)])[0].result(0)
        engine.close()


# ------------------------------------------------------------------------------------------ the plan


def test_the_embedded_engine_needs_nothing() -> None:
    assert engine_kind("torch").check(Deployment()) == "torch: embedded, in_flight updates"


def test_a_server_command_must_be_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    spec = deployment(SGLangSpec(command=("my-server", "--fast"), servers=2, tp_size=4), count=3)
    with pytest.raises(ConfigError, match=r"'my-server' is not on PATH.*deploy/sglang-cpu/install.*asyncrl\[sglang\]"):
        SGLangKind({}).check(spec)
    (tmp_path / "my-server").touch(mode=0o755)
    assert SGLangKind({}).check(spec) == "sglang: 3 × 2 servers, tensor parallel 4, by `my-server --fast`; drain updates"


def test_a_server_is_replaced_before_the_run_counts_as_stalled() -> None:
    urls = SGLangSpec(urls=("http://127.0.0.1:30000",))
    with pytest.raises(ConfigError, match=r"update_timeout_s=300 >= limits\.stall_timeout_s=300.*make it much smaller"):
        SGLangKind({}).check(deployment(urls, limits=LimitsSpec(update_timeout_s=300.0)))


def test_the_default_command_needs_sglang_and_its_kernels() -> None:
    spec = deployment(SGLangSpec())
    both = {"sglang": "0.5.20", "sglang-kernel": "0.4.7"}
    assert SGLangKind({}, both.__getitem__).check(spec).startswith("sglang: 1 × 1 servers")
    with pytest.raises(ConfigError, match=r"sglang is not installed here.*asyncrl\[sglang\].*deploy/sglang-cpu/install"):
        SGLangKind({}, lambda _: "").check(spec)
    with pytest.raises(ConfigError, match=r"sglang 0\.5\.20 is here without its CUDA kernels.*command=\[sglang-cpu-server\]"):
        SGLangKind({}, {**both, "sglang-kernel": ""}.__getitem__).check(spec)
    # Whoever writes the command out knows what python it is.
    assert SGLangKind({}, lambda _: "").check(deployment(SGLangSpec(command=("python", "-m", "my.launcher"))))


def test_a_python_of_another_environment_starts_the_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrapper in its place: with a path of its own, on which lies another version, and without ours."""
    packages, python = tmp_path / "packages", tmp_path / "bin" / "python"
    (packages / "sglang-9.9.dist-info").mkdir(parents=True)
    (packages / "sglang-9.9.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: sglang\nVersion: 9.9\n")
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\n[ -n "$PYTHONPATH" ] && exit 7\nPYTHONPATH={packages} exec {sys.executable} "$@"\n')
    monkeypatch.setenv("PYTHONPATH", "/of/asyncrl")
    spec = SGLangSpec(python=str(python))
    with pytest.raises(ConfigError, match=rf"sglang\.python='{python}' could not start a server: .*Permission denied"):
        SGLangKind({}, lambda _: "").check(deployment(spec))
    python.chmod(0o755)
    plan = SGLangKind({}, lambda _: "").check(deployment(spec))
    assert plan.endswith(f"by `{python} -m sglang.launch_server`; drain updates; its environment has sglang 9.9")
    start = launch_command(EngineSpec(kind="sglang", sglang=spec), ModelSpec(path="m"), PlaceSpec(), 0, 64, log=tmp_path / "l")
    assert start.command[:3] == (str(python), "-m", "sglang.launch_server")
    assert start.env["PYTHONPATH"] == ""
    (packages / "sglang-9.9.dist-info" / "METADATA").unlink()
    (packages / "sglang-9.9.dist-info").rmdir()
    empty = python.with_name("empty")
    empty.write_text(f'#!/bin/sh\nexec {sys.executable} -S -I "$@"\n')
    empty.chmod(0o755)
    with pytest.raises(ConfigError, match=r"No package metadata was found for sglang; name the Python of an environment"):
        SGLangKind({}, lambda _: "").check(deployment(SGLangSpec(python=str(empty))))
    on_a_cluster = SGLangKind({}).check(deployment(SGLangSpec(python="/no/such"), ray_address="10.0.0.1:6379"))
    assert on_a_cluster.endswith("the generators' nodes of the Ray at 10.0.0.1:6379 must have it")
    for wrong, said in (
        ({"python": "bin/python"}, "is relative"),
        ({"python": "/p", "command": ("s",)}, "with a command or urls of your own would be ignored"),
        ({"python": "/p", "urls": ("http://127.0.0.1:1",)}, "with a command or urls"),
    ):
        with pytest.raises(ConfigError, match=said):
            SGLangSpec(**wrong)


@pytest.mark.parametrize(("address", "environ"), [("10.0.0.1:6379", {}), ("", {"RAY_ADDRESS": "10.0.0.1:6379"})])
def test_on_a_cluster_the_plan_says_what_its_nodes_need(address: str, environ: dict[str, str]) -> None:
    spec = deployment(SGLangSpec(command=("no-such-server",)), ray_address=address)
    plan = SGLangKind(environ, lambda _: "").check(spec)
    assert plan.endswith("by `no-such-server`; drain updates; the generators' nodes of the Ray at 10.0.0.1:6379 must have it")


def test_servers_that_run_already_need_nothing_here_but_their_key(tmp_path: Path) -> None:
    plan = "sglang: attached to http://127.0.0.1:30000, http://localhost:30001, {}; drain updates"
    urls, key = ("http://127.0.0.1:30000", "http://localhost:30001"), tmp_path / "key"
    assert SGLangKind({}, lambda _: "").check(deployment(SGLangSpec(urls=urls))) == plan.format("without a key")
    spec = SGLangSpec(urls=urls, api_key_file=str(key))
    with pytest.raises(ConfigError, match=r"api_key_file=.*can't be read on this machine"):
        SGLangKind({}).check(deployment(spec))
    on_a_cluster = SGLangKind({}).check(deployment(spec, ray_address="10.0.0.1:6379"))  # whose nodes have it
    key.touch(mode=0o600)
    key.write_text("secret")
    assert SGLangKind({}).check(deployment(spec)) == on_a_cluster == plan.format(f"with the key in {key}")


# ---------------------------------------------------------------------------------------- the doctor


def test_sglang_for_gpus_is_told_from_the_one_for_cpus_by_its_kernels() -> None:
    gpu = row("sglang (GPU)", SGLangKind(installed={"sglang": "0.5.20", "sglang-kernel": "0.4.7"}.__getitem__))
    assert (gpu.status, gpu.detail) == ("ok", "sglang 0.5.20, sglang-kernel 0.4.7: production engine")
    cpu = row("sglang (GPU)", SGLangKind(installed={"sglang": "0.5.20", "sglang-kernel": ""}.__getitem__))
    assert (cpu.status, cpu.fix, cpu.required) == ("missing", "pip install 'asyncrl[sglang]'", False)
    assert "without its CUDA kernels" in cpu.detail
    assert row("sglang (GPU)", SGLangKind(installed=lambda _: "")).detail == "production engine"


def test_the_cpu_server_of_this_environment(tmp_path: Path) -> None:
    command = tmp_path / "bin" / "sglang-cpu-server"

    def verdict(found: Path | None, version: str) -> tuple[str, str, str]:
        kind = SGLangKind(installed=lambda _: version, find=lambda _: str(found) if found else None, prefix=tmp_path)
        finding = row("sglang (CPU)", kind)
        assert not finding.required
        return finding.status, finding.detail, finding.fix

    install = "deploy/sglang-cpu/install"
    assert verdict(None, "0.5.20") == ("missing", "SGLang without GPUs", install)
    assert verdict(Path("/other/server"), "") == ("ok", "/other/server, of another environment: SGLang without GPUs", "")
    command.parent.mkdir()
    command.touch()
    assert verdict(command, "0.5.20") == ("ok", "sglang 0.5.20, sglang-cpu-server: SGLang without GPUs", "")
    assert verdict(command, "") == ("broken", f"{command} without sglang", install)
    assert verdict(None, "0.5.20")[0] == "ok"  # the environment is not activated, and asyncrl looks beside its own Python
