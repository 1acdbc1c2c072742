"""From a deployment's words to a server's command line and its way in for weights."""

import asyncio
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen3Config

from asyncrl.config import EngineSpec, GeneratorsSpec, ModelSpec, PlaceSpec, SGLangSpec
from asyncrl.errors import ConfigError, Unavailable
from asyncrl.generate.engines import EngineSite
from asyncrl.generate.sglang.build import launch_command, sglang_engine
from asyncrl.generate.sglang.distributed import Distributed
from asyncrl.generate.sglang.keys import RunningServer
from asyncrl.generate.sglang.server import LaunchCommand, SGLangServer
from asyncrl.generate.sglang.transfer import SharedMemory
from asyncrl.generate.sglang.wire import Facts
from asyncrl.types import GenerationRequest, Sampling, Version

MODEL = ModelSpec(path="/models/qwen", dtype="bfloat16")


def flags(command: tuple[str, ...]) -> dict[str, str | bool]:
    """{"--name": value}; True for a bare flag."""
    found: dict[str, str | bool] = {}
    for word, after in zip(command, (*command[1:], "--"), strict=True):
        if word.startswith("--"):
            found[word] = True if after.startswith("--") else after
    return found


def launched(
    index: int = 0, max_length: int = 512, threads: int = 1, gpus: float = 0, mode: Any = "in_flight", **sglang: Any
) -> LaunchCommand:
    place = PlaceSpec(threads=threads, gpus=gpus)
    spec = EngineSpec(kind="sglang", slots=48, update_mode=mode, sglang=SGLangSpec(**sglang))
    return launch_command(spec, MODEL, place, index, max_length, log=Path("log"))


def test_a_server_is_started_with_what_asyncrl_relies_on() -> None:
    start = launched()
    assert start.command[:3] == ("python", "-m", "sglang.launch_server")
    assert start.log == Path("log")
    assert flags(start.command) == {
        "--model-path": "/models/qwen",
        "--dtype": "bfloat16",
        "--host": "127.0.0.1",
        "--context-length": "528",  # 512, and 16 that SGLang keeps for itself
        "--max-running-requests": "48",
        "--tensor-parallel-size": "1",
        "--skip-tokenizer-init": True,
        "--incremental-streaming-output": True,
        "--disable-radix-cache": True,
        "--log-level": "warning",
    }
    assert start.env == {"OMP_NUM_THREADS": "1", "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"}


def test_a_server_loads_the_revision_and_the_configuration_of_the_recipe() -> None:
    model = ModelSpec(path="a/b", revision="v2", override_config={"rope_parameters": {"factor": 2.0}})
    start = launch_command(EngineSpec(kind="sglang"), model, PlaceSpec(), 0, 512, log=Path("log"))
    found = flags(start.command)
    assert (found["--revision"], found["--json-model-override-args"]) == ("v2", '{"rope_parameters": {"factor": 2.0}}')


def test_servers_of_one_generator_take_gpus_one_after_the_other() -> None:
    assert [flags(launched(index, gpus=6, tp_size=2).command)["--base-gpu-id"] for index in range(3)] == ["0", "2", "4"]
    assert "--base-gpu-id" not in flags(launched(1).command)  # on a CPU, it would be a NUMA node
    assert flags(launched(tp_size=2).command)["--tensor-parallel-size"] == "2"


@pytest.mark.parametrize(
    ("mode", "prefix_cache", "shown"),
    [
        ("in_flight", False, {"--disable-radix-cache"}),
        ("in_flight", True, set()),
        ("drain", True, set()),
        ("keep_kv", False, {"--disable-radix-cache", "--disable-overlap-schedule"}),
    ],
)
def test_the_update_mode_decides_over_cache_and_schedule(mode: str, prefix_cache: bool, shown: set[str]) -> None:
    found = flags(launched(mode=mode, prefix_cache=prefix_cache).command)
    assert found.keys() & {"--disable-radix-cache", "--disable-overlap-schedule"} == shown


def test_any_other_argument_goes_through_and_wins() -> None:
    arguments: dict[str, Any] = {
        "attention-backend": "fa3",
        "--log_level": "info",
        "enable_metrics": True,
        "incremental-streaming-output": False,
        "max-total-tokens": 4096,
        "schedule-conservativeness": 0.5,
    }
    found = flags(launched(args=arguments).command)
    assert found["--attention-backend"] == "fa3"
    assert found["--log-level"] == "info"
    assert found["--enable-metrics"] is True
    assert found["--max-total-tokens"] == "4096"
    assert found["--schedule-conservativeness"] == "0.5"
    assert "--incremental-streaming-output" not in found


def test_what_the_deployment_says_of_memory_threads_and_environment() -> None:
    start = launched(mem_fraction=0.7, threads=4, env={"A": "b"}, command=("my-server", "--extra"))
    assert start.command[:2] == ("my-server", "--extra")
    assert flags(start.command)["--mem-fraction-static"] == "0.7"
    assert (start.env["OMP_NUM_THREADS"], start.env["A"]) == ("4", "b")
    assert launched(env={"OMP_NUM_THREADS": "2"}, threads=4).env["OMP_NUM_THREADS"] == "2"


@pytest.mark.parametrize("name", ["port", "--host", "model_path", "model", "config", "--api-key", "admin_api_key"])
def test_where_a_server_listens_what_it_serves_and_to_whom_is_not_for_args(name: str) -> None:
    with pytest.raises(ConfigError, match=r"is chosen by asyncrl.*engine\.sglang\.urls"):
        launched(args={name: "x"})


# Every spelling that SGLang's parser takes, its abbreviations included: `--tp` is one.
@pytest.mark.parametrize(
    "name",
    [
        *("tp", "tp-size", "tp_size", "--tp_size", "tensor-parallel-size", "--tensor-parallel"),
        *("dp", "--dp", "dp-size", "--dp-size", "dp_size", "--dp-size=2", "data-parallel-size", "data_parallel"),
        *("pp-size", "pp_size", "pipeline-parallel-size", "nnodes", "node-rank", "dist-init-addr", "nccl_init_addr"),
        *("base-gpu-id", "gpu_id_step", "enable-dp-attention", "use-ray"),
    ],
)
def test_what_decides_over_gpus_is_not_for_args_nor_for_the_command(name: str) -> None:
    with pytest.raises(
        ConfigError, match=r"engine\.sglang\.args: .*decides over GPUs.*set engine\.sglang\.tp_size and servers"
    ):
        SGLangSpec(args={name: 2})
    if name.startswith("--"):
        with pytest.raises(ConfigError, match=r"engine\.sglang\.command: .*decides over GPUs"):
            SGLangSpec(command=("python", "-m", "sglang.launch_server", name, "2"))


def test_arguments_that_only_look_alike_are_the_users() -> None:
    for name in ("ep-size", "moe-dp-size", "enable-dp-lm-head", "max-total-tokens", "attn-cp-size", "mem-fraction-static"):
        SGLangSpec(args={name: 2}, command=("my-server", "--device", "cpu", "-m", f"--{name}"))
    with pytest.raises(ConfigError, match=r"'tokenizer-worker-num'.*another way into the server, without its key"):
        SGLangSpec(args={"tokenizer-worker-num": 2})


@pytest.mark.parametrize(
    ("facts", "missing"),
    [
        (Facts(), "--disable-radix-cache and --disable-overlap-schedule"),
        (Facts(disable_radix_cache=True), "without --disable-overlap-schedule"),
        (Facts(disable_overlap_schedule=True), "without --disable-radix-cache"),
        (Facts(disable_radix_cache=True, disable_overlap_schedule=True), ""),
    ],
)
def test_a_server_found_running_must_be_able_to_label_its_tokens(facts: Facts, missing: str) -> None:
    async def run() -> None:
        server = SGLangServer(RunningServer("http://127.0.0.1:1"), lambda _: SharedMemory(1))
        server.facts = facts
        server.require("in_flight")
        if missing:
            with pytest.raises(ConfigError, match=missing):
                server.require("keep_kv")
        else:
            server.require("keep_kv")
        await server.close()

    asyncio.run(run())


class StartingClient:
    """Of a server that is ready when it is asked for the fourth time; it takes whatever is posted."""

    url, key = "http://there:1", ""

    def __init__(self) -> None:
        self.asked = 0

    async def check(self, path: str, deadline_s: float) -> None:
        self.asked += 1
        if self.asked < 4:
            raise Unavailable("connection refused")

    async def get(self, path: str, decoder: Any, deadline_s: float) -> Facts:
        return Facts()

    async def post(self, path: str, body: dict[str, Any], deadline_s: float) -> dict[str, bool]:
        return {"success": True}

    async def close(self) -> None: ...


class TwoPieces(SharedMemory):
    async def send(self, post: Callable[..., Any], staged: Any) -> None:
        await post("/update", {})
        await post("/update", {})


def test_a_server_beats_while_it_starts_and_with_every_piece_of_weights() -> None:
    async def run() -> None:
        server = SGLangServer(RunningServer("http://there:1"), lambda _: TwoPieces(1))
        await server.client.close()
        server.client = StartingClient()  # type: ignore[assignment]
        await server.open(60.0)
        assert server.beats == 3
        await server.update(None, 60.0)  # type: ignore[arg-type]
        assert server.beats == 5
        await server.close()

    asyncio.run(run())


# ---------------------------------------------------------------------------------------- the engine


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    """A configuration without weights: building an engine reads no more of a model."""
    folder = tmp_path_factory.mktemp("model")
    Qwen3Config(vocab_size=100, max_position_embeddings=64).save_pretrained(folder)
    return ModelSpec(path=str(folder))


Build = Callable[..., Any]


@pytest.fixture
def build(model: ModelSpec, tmp_path: Path) -> Build:
    """build(gpus=…, max_length=…, **SGLangSpec): an engine of this machine's own python that is never started."""

    def make(gpus: float = 0.0, max_length: int = 2048, **sglang: Any) -> Any:
        sglang = {"command": (sys.executable,)} | sglang
        spec = EngineSpec(kind="sglang", slots=64, max_length=max_length, sglang=SGLangSpec(**sglang))
        place = PlaceSpec(gpus=gpus)
        return sglang_engine(
            EngineSite(generators=GeneratorsSpec(engine=spec, place=place), model=model, logs=tmp_path, name="gen-0")
        )

    return make


@pytest.mark.parametrize(
    ("transfer", "urls", "gpus", "expected"),
    [
        ("auto", (), 0.0, (SharedMemory, "cpu")),
        ("auto", (), 1.0, (SharedMemory, "cuda")),
        ("auto", ("http://127.0.0.1:1",), 0.0, (Distributed, "gloo")),
        ("auto", ("http://127.0.0.1:1",), 1.0, (Distributed, "nccl")),
        ("shared", ("http://127.0.0.1:1",), 1.0, (SharedMemory, "cpu")),
        ("shared", (), 1.0, (SharedMemory, "cpu")),
        ("cuda_ipc", (), 1.0, (SharedMemory, "cuda")),
        ("distributed", (), 0.0, (Distributed, "gloo")),
    ],
)
def test_weights_take_the_fastest_way_that_fits(
    transfer: Any, urls: tuple[str, ...], gpus: float, expected: tuple[type, str]
) -> None:
    from asyncrl.generate.sglang.build import _transfer

    made = _transfer(SGLangSpec(transfer=transfer, urls=urls), host="10.0.0.1", gpus=gpus)
    assert isinstance(made, partial)
    told = (*made.args, *made.keywords.values())
    assert (made.func, told) == (expected[0], ("10.0.0.1", expected[1]) if expected[0] is Distributed else (expected[1],))


def test_cuda_ipc_without_a_gpu_is_refused(build: Build) -> None:
    with pytest.raises(ConfigError, match=r"transfer='cuda_ipc'.*gpus=0"):
        build(transfer="cuda_ipc")


def test_a_command_that_is_not_there_is_refused(build: Build) -> None:
    with pytest.raises(ConfigError, match="'no-such-server' is not on PATH"):
        build(command=("no-such-server",))
    build(command=("no-such-server",), urls=("http://127.0.0.1:1",)).close()  # nothing is started here


def test_a_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    spec = EngineSpec(kind="sglang", sglang=SGLangSpec(command=(sys.executable,)))
    model = ModelSpec(path=str(tmp_path))
    site = EngineSite(generators=GeneratorsSpec(engine=spec), model=model, logs=tmp_path, name="gen-0")
    with pytest.raises(ConfigError, match=r"model\.path"):
        sglang_engine(site)


def test_length_is_bounded_by_the_model_and_slots_are_per_server(build: Build) -> None:
    engine = build(servers=3)
    assert (engine.max_length, engine.slots, engine.version) == (64, 192, None)
    assert build(max_length=32).max_length == 32


def request_of(group: int, goes_on: bool = False) -> GenerationRequest:
    sampling = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=8, stop_token_ids=())
    return GenerationRequest(id="a", group=group, prompt_ids=(1,), sampling=sampling, seed=0, goes_on=goes_on)


def test_the_least_loaded_server_that_is_up_takes_the_next_rows_once_there_are_weights(build: Build) -> None:
    engine, single = build(servers=3), request_of(4)
    first, second, third = engine._replicas
    second.up = third.up = True
    assert engine.slots == 128
    assert engine._next_replica(single) is None  # nothing is decoded before the first weights
    engine.version = Version(1, 1)
    assert engine._next_replica(single) is second  # of equals, the first
    second.rows.update({object(), object()})
    third.rows.add(object())
    assert engine._next_replica(single) is third
    first.up = True
    assert engine._next_replica(single) is first
    second.up = first.up = third.up = False
    assert engine._next_replica(single) is None
    assert engine.slots == 192
    first.up, engine._paused = True, True
    assert engine._next_replica(single) is None


def test_turns_of_a_groups_episodes_go_to_one_server(build: Build) -> None:
    """Where what was computed for the turn before is."""
    engine = build(servers=3)
    engine.version = Version(1, 1)
    for replica in engine._replicas:
        replica.up = True
    engine._replicas[1].rows.update({object(), object()})
    assert [engine._next_replica(request_of(group, goes_on=True)) for group in (4, 4, 5)] == [
        engine._replicas[index] for index in (1, 1, 2)
    ]


def test_before_its_start_an_engine_has_no_process_and_after_its_end_it_says_closed(build: Build) -> None:
    engine, request = build(), request_of(0)
    assert (engine.pids(), engine.servers()) == ([], [])
    engine.close()
    assert "closed" in str(engine.submit_group([request])[0].exception(0))
