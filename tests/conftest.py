"""Which tests are quick; and what whole-run tests share: a tiny model and data on disk, and one local Ray for all of them."""

import fcntl
import functools
import gc
import importlib.util
import inspect
import json
import multiprocessing
import multiprocessing.connection
import os
import runpy
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import settings

from asyncrl.config import (
    AlgorithmSpec,
    CheckpointSpec,
    DataSpec,
    LearnerSpec,
    ModelSpec,
    Recipe,
    RewardSpec,
    SamplingSpec,
    StalenessSpec,
)
from asyncrl.containment import SWITCH, refused
from asyncrl.rundir import RunDir

ROOT = Path(__file__).resolve().parents[1]
# Background jobs of a shell ignore the first, under nohup the second, too; and what tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
settings.register_profile("asyncrl", deadline=None)  # a busy machine is no defect
settings.load_profile("asyncrl")
REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return solution_str.count(ground_truth) / 6
"""

# Policy gradient whose every update (one pack each) past `through` waits for a file, for at most two minutes.
HELD_LOSS = """
import itertools, os, time

updates = itertools.count(1)

def loss(logp_t, old_t, advantages_t, sequence_t):
    deadline = time.monotonic() + 120
    if next(updates) > {through}:
        while not os.path.exists({gate!r}) and time.monotonic() < deadline:
            time.sleep(0.01)
    return -(logp_t - old_t).exp() * advantages_t, {{}}
"""


class Fifo:
    """Tells whether any process holds it open that has written to it: whatever its number, and wherever it has hidden."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.path = str(path)
        self._events = select.poll()
        self._reading = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        self._events.register(self._reading, select.POLLIN)

    def wait_held(self) -> None:
        assert self._events.poll(30_000) == [(self._reading, select.POLLIN)]
        os.read(self._reading, 100)
        assert not self._events.poll(0)

    def wait_free(self) -> None:
        self._events.modify(self._reading, 0)  # a hang-up is told all the same, if somebody has ever held it
        assert self._events.poll(30_000) == [(self._reading, select.POLLHUP)]

    def close(self) -> None:
        os.close(self._reading)


@pytest.fixture
def fifo(tmp_path: Path) -> Iterator[Fifo]:
    made = Fifo(tmp_path / "fifo")
    yield made
    made.close()


@pytest.fixture(params=["namespaces", "no namespaces"])
def contained(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of keeping processes together; that of the machine comes with every other test."""
    if request.param == "no namespaces":
        monkeypatch.setenv(SWITCH, "off")
    elif why := refused():
        pytest.skip(f"this machine gives no namespaces: {why}")


@pytest.fixture
def plain_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that rewards and episodes run in have the numbers that they think they have."""
    monkeypatch.setenv(SWITCH, "off")


@dataclass(frozen=True)
class Hold:
    """A learner that does not go past an update until it is let go: what is done to the run till then falls into it.

    algorithm: for the recipe of the run, whose total_steps are more than max_lag + 1 further: rollouts run ahead that far.
    A learner that was restarted counts from one again.
    """

    algorithm: AlgorithmSpec
    gate: Path

    def release(self) -> None:
        self.gate.touch()


# A test is `quick` unless it stands in tests/runs, is marked so, or uses a fixture that starts a Ray, a server or a training.
HEAVY_MARKS = ("ray", "server", "gpu", "slow")
HEAVY_FIXTURES = {"local_ray", "sglang_on_cpu", "arithmetic_data"}
HEAVY_PROGRAMS = ("gcs_server", "raylet", "sglang-cpu-server", "sglang.launch_server")


# Tests that share what is dear to start; the first match wins. Two processes take these, the largest first, then all others.
MACHINERY = {
    "servers": ("tests/generate/sglang/test_engine", "tests/generate/sglang/test_transfer_server", "tests/runs/test_sglang"),
    "commands": ("tests/runs/test_cli_runs",),  # start a Ray of their own
    "runs": ("tests/runs/",),
    "supervision": ("tests/cluster/", "tests/test_api"),
}


def is_quick(item: Any) -> bool:
    marked = any(item.get_closest_marker(name) for name in HEAVY_MARKS)
    return not (marked or item.path.is_relative_to(ROOT / "tests" / "runs") or HEAVY_FIXTURES & set(item.fixturenames))


class QuickGuard:
    """Sees every process that this one starts, as an audit hook (which Python never lets go): the mark `quick` can't lie."""

    on = False

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.on and event == "subprocess.Popen":
            command = " ".join(map(str, arguments[1]))
            heavy = [program for program in HEAVY_PROGRAMS if program in command]
            assert not heavy, f"a quick test starts {heavy[0]}; see HEAVY_MARKS in tests/conftest.py"


QUICK_GUARD = QuickGuard()
sys.addaudithook(QUICK_GUARD)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    QUICK_GUARD.on = item.get_closest_marker("quick") is not None
    try:
        return (yield)
    finally:
        QUICK_GUARD.on = False


@pytest.hookimpl(tryfirst=True)  # before xdist reads its options
def pytest_cmdline_main(config: pytest.Config) -> None:
    """All tests, or all of a mark, run in two processes; named ones in one, and whatever `-n` says goes before."""
    if "PYTEST_XDIST_WORKER" in os.environ or not config.pluginmanager.hasplugin("xdist"):
        return  # one of the two itself
    if config.args_source is not pytest.Config.ArgsSource.ARGS and config.option.numprocesses is None:
        config.option.numprocesses, config.option.dist = 2, "loadscope"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """What shares a Ray or SGLang servers stays in one process; all else goes, one by one, to whichever is free.

    By path: xdist's own groups need node ids that pytest 9.2 no longer lets it change.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByMachinery(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return next((scope for scope, paths in MACHINERY.items() if nodeid.startswith(paths)), nodeid)

    return ByMachinery(config, log)


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if is_quick(item):
            item.add_marker("quick")
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        import torch

        if not torch.cuda.is_available():
            for item in gpu:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    """What was imported stays: the garbage collector, which tests of leaks call again and again, need not look at it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Figures do not depend on the machine's cores, which tests share with the actors of whole runs."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def descriptors() -> Callable[[], int]:
    """Counts this process's open files, pipes and memory; not its sockets, which Ray's threads open and close at will."""

    def count() -> int:
        gc.collect()
        kinds = []
        for entry in Path("/proc/self/fd").iterdir():
            with suppress(OSError):  # closed meanwhile: the one that lists them
                kinds.append(os.readlink(entry))
        return sum(not kind.startswith(("socket:", "anon_inode:")) for kind in kinds)

    return count


@pytest.fixture(scope="session")
def gang(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Any]]:
    """gang(layouts, function, *arguments): what function(ranks, *arguments) returns on every rank of a group of processes over
    gloo, in order. A rank's error ends all of them, and is raised with its traceback. Start-up: 4 s once, then 0.1 s each.
    layouts: a Layout, or one for each group of ranks."""
    from ray import cloudpickle

    context = multiprocessing.get_context("forkserver")
    used = [f"transformers.models.{name}.modeling_{name}" for name in ("qwen3", "llama")]
    context.set_forkserver_preload(["ray.cloudpickle", "asyncrl.learn.checkpoint", "asyncrl.models.value", *used])

    def run(layouts: Any, function: Callable[..., Any], *arguments: Any, timeout_s: float = 120) -> list[Any]:
        for value in filter(inspect.isfunction, (function, *arguments)):
            if not value.__module__.startswith("asyncrl"):  # a test file is no module that another process could import
                cloudpickle.register_pickle_by_value(sys.modules[value.__module__])
        count = sum(layout.ranks for layout in (layouts.values() if isinstance(layouts, dict) else [layouts]))
        job = cloudpickle.dumps((layouts, count, function, arguments))
        store = str(tmp_path_factory.mktemp("gang") / "store")
        pipes = [context.Pipe(duplex=False) for _ in range(count)]
        told = [{"connection": writer, "store": store, "rank": rank, "job": job} for rank, (_, writer) in enumerate(pipes)]
        processes = [context.Process(target=runpy.run_path, args=(str(ROOT / "tests" / "rank.py"), of)) for of in told]
        for process in processes:
            process.start()
        for _, writer in pipes:
            writer.close()
        try:
            return _results(cloudpickle.loads, [reader for reader, _ in pipes], timeout_s)
        finally:
            for process in processes:
                process.join(5)
                process.kill()

    return run


def _results(loads: Callable[[bytes], Any], readers: list[Any], timeout_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout_s
    while len(results) < len(readers):
        ready = multiprocessing.connection.wait(
            [r for i, r in enumerate(readers) if i not in results], deadline - time.monotonic()
        )
        assert ready, f"ranks {sorted(set(range(len(readers))) - results.keys())} have not ended after {timeout_s:g} s"
        for reader in ready:
            rank = readers.index(reader)
            try:
                results[rank], error = loads(reader.recv_bytes())
            except EOFError:
                error = "it died"
            assert not error, f"rank {rank}: {error}"
    return [results[rank] for rank in range(len(readers))]


@pytest.fixture(scope="session")
def sglang_on_cpu() -> None:
    """Skips where there is no SGLang for this CPU; fails instead where CI says that there must be."""
    if shutil.which("sglang-cpu-server") is None:
        missing = "sglang-cpu-server is not on PATH: run deploy/sglang-cpu/install"
        (pytest.fail if os.environ.get("ASYNCRL_REQUIRE_SGLANG") else pytest.skip)(missing)


@pytest.fixture(scope="session")
def script() -> Callable[[Path], ModuleType]:
    """script(path): the module that a file makes which no package holds."""

    def load(path: Path) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        if str(path.parent) not in sys.path:  # where it finds its neighbours
            sys.path.append(str(path.parent))
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def arithmetic(script: Callable[[Path], ModuleType]) -> ModuleType:
    """The module recipes/arithmetic.py."""
    return script(ROOT / "recipes" / "arithmetic.py")


@pytest.fixture(scope="session")
def arithmetic_data(tmp_path_factory: pytest.TempPathFactory, arithmetic: ModuleType) -> Path:
    """The `data` folder of recipes/arithmetic.py, its warm policy included, for runs to copy: half a minute of work, which the
    first of several test processes does for all."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with (base / "arithmetic.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run = RunDir(base / "arithmetic").create()
        arithmetic.prepare(arithmetic.recipe, run.path)
    return run.data


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, arithmetic: ModuleType) -> Path:
    """A random Qwen3 of about 20,000 parameters with a character tokenizer, as a Hugging Face folder."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=17,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    arithmetic.make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_recipe_in(tiny_model: Path) -> Callable[..., Recipe]:
    """Makes a recipe in a folder, over 64 prompts, that asks for many sevens; fields of `Recipe` may be replaced."""

    def make(folder: Path, **changes: Any) -> Recipe:
        data, reward = folder / "train.jsonl", folder / "sevens.py"
        rows = [{"prompt": f"{i:02d}+{7 * i % 100:02d}=", "data_source": "sevens", "answer": "7"} for i in range(64)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        reward.write_text(REWARD)
        fields: dict[str, Any] = {
            "name": "tiny",
            "model": ModelSpec(path=str(tiny_model)),
            "data": DataSpec(files=(str(data),), answer_key="answer", max_prompt_length=8),
            "reward": RewardSpec(function=f"{reward}:compute_score"),
            "sampling": SamplingSpec(n=4, max_response_length=6),
            "staleness": StalenessSpec(max_lag=4),
            "learner": LearnerSpec(batch_groups=4, lr=1e-3),
            "checkpoint": CheckpointSpec(save_freq=3),
            "total_steps": 5,
        }
        return Recipe(**(fields | changes))

    return make


@pytest.fixture
def tiny_recipe(tmp_path: Path, tiny_recipe_in: Callable[..., Recipe]) -> Callable[..., Recipe]:
    """`tiny_recipe_in` the test's own folder."""
    return functools.partial(tiny_recipe_in, tmp_path)


@pytest.fixture(scope="session")
def metrics_of() -> Callable[..., list[dict[str, Any]]]:
    """The lines of an ended run's metrics.jsonl, of one kind (`step`, `eval`, `actors`) or all."""

    def read(run_dir: str | Path, kind: str = "") -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
        return [line for line in lines if kind in ("", line["kind"])]

    return read


@pytest.fixture(scope="session")
def events_of() -> Callable[[str | Path], list[Any]]:
    """All that an ended run's store wrote down, in order."""
    from asyncrl.replay import open
    from asyncrl.replay.log import events

    def read(run_dir: str | Path) -> list[Any]:
        return [events.decode(payload) for payload in open(run_dir).events().column("payload").to_pylist()]

    return read


@pytest.fixture(scope="session")
def hold_in() -> Callable[..., Hold]:
    """Makes a hold in a folder, after an update; fields of its `AlgorithmSpec` may be given."""

    def make(folder: Path, update: int, **algorithm: Any) -> Hold:
        module, gate = folder / "held.py", folder / "released"
        module.write_text(HELD_LOSS.format(through=update, gate=str(gate)))
        return Hold(AlgorithmSpec(policy_loss=f"{module}:loss", **algorithm), gate)

    return make


@pytest.fixture
def hold_after(tmp_path: Path, hold_in: Callable[..., Hold]) -> Callable[..., Hold]:
    """`hold_in` the test's own folder."""
    return functools.partial(hold_in, tmp_path)


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """One small Ray for every test that needs one; a run finds it and leaves it."""
    import ray

    from asyncrl.cluster.forkserver import forkserver
    from asyncrl.cluster.session import WORKER_MODULES

    with forkserver(WORKER_MODULES) as executable:
        own = {"num_cpus": 2, "include_dashboard": False, "runtime_env": {"py_executable": executable}}
        ray.init(address="local", log_to_driver=False, logging_level="error", **own)
        yield
        ray.shutdown()
