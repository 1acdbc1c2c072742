"""Which engines a run can start here, and what the plan says of them."""

from pathlib import Path

import pytest

from asyncrl.cluster.engines import check_engine
from asyncrl.config import Deployment, EngineSpec, GeneratorsSpec, SGLangSpec
from asyncrl.errors import ConfigError


def deployment(sglang: SGLangSpec, count: int = 1, ray_address: str = "") -> Deployment:
    engine = EngineSpec(kind="sglang", update_mode="drain", sglang=sglang)
    return Deployment(ray_address=ray_address, generators=GeneratorsSpec(count=count, engine=engine))


def test_the_embedded_engine_needs_nothing() -> None:
    assert check_engine(Deployment(), {}) == "torch: embedded, in_flight updates"


def test_a_server_command_must_be_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    spec = deployment(SGLangSpec(command=("my-server", "--fast"), servers=2, tp_size=4), count=3)
    with pytest.raises(ConfigError, match=r"'my-server' is not on PATH.*deploy/sglang-cpu/install.*asyncrl\[sglang\]"):
        check_engine(spec, {})
    (tmp_path / "my-server").touch(mode=0o755)
    assert check_engine(spec, {}) == "sglang: 3 × 2 servers, tensor parallel 4, by `my-server --fast`; drain updates"


def test_the_default_command_needs_sglang_and_its_kernels() -> None:
    spec = deployment(SGLangSpec())
    both = {"sglang": "0.5.20", "sglang-kernel": "0.4.7"}
    assert check_engine(spec, {}, both.__getitem__).startswith("sglang: 1 × 1 servers")
    with pytest.raises(ConfigError, match=r"sglang is not installed here.*asyncrl\[sglang\].*deploy/sglang-cpu/install"):
        check_engine(spec, {}, lambda _: "")
    with pytest.raises(ConfigError, match=r"sglang 0\.5\.20 is here without its CUDA kernels.*command=\[sglang-cpu-server\]"):
        check_engine(spec, {}, {**both, "sglang-kernel": ""}.__getitem__)
    # Whoever writes the command out knows what python it is.
    assert check_engine(deployment(SGLangSpec(command=("python", "-m", "my.launcher"))), {}, lambda _: "")


@pytest.mark.parametrize(("address", "environ"), [("10.0.0.1:6379", {}), ("", {"RAY_ADDRESS": "10.0.0.1:6379"})])
def test_on_a_cluster_the_plan_says_what_its_nodes_need(address: str, environ: dict[str, str]) -> None:
    spec = deployment(SGLangSpec(command=("no-such-server",)), ray_address=address)
    plan = check_engine(spec, environ, lambda _: "")
    assert plan.endswith("by `no-such-server`; drain updates; the generators' nodes of the Ray at 10.0.0.1:6379 must have it")


def test_servers_that_run_already_need_nothing_here() -> None:
    spec = deployment(SGLangSpec(urls=("http://a:30000", "http://b:30000")))
    assert check_engine(spec, {}, lambda _: "") == "sglang: attached to http://a:30000, http://b:30000; drain updates"
