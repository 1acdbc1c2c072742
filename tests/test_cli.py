"""The command line as a person meets it: whole processes, one-screen errors, exit statuses, and no torch in the way."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from asyncrl import cli
from asyncrl.errors import ActorFailed, ConfigError, DataError, DiskFull
from asyncrl.manifests import write_manifest

RECIPE = """
from asyncrl.config import *

recipe = Recipe(
    name="sums",
    model=ModelSpec(path="model"),
    data=DataSpec(files=("train.parquet",), max_prompt_length=64),
    reward=RewardSpec(function="rewards.py:compute_score"),
    sampling=SamplingSpec(n=4, max_response_length=64),
    learner=LearnerSpec(batch_groups=8),
    total_steps=10,
)
"""

FAILING_JOB = """
def add(parser):
    parser.set_defaults(job=fail)

def fail(args):
    raise ERROR
"""

# Runs the real command line in a fresh interpreter, then tells what it cost and what it imported.
CHILD = """
import resource, sys
from asyncrl.cli import main
status = main(sys.argv[1:])
heavy = sorted(name for name in ("torch", "transformers", "ray") if sys.modules.get(name))  # None: told to do without
usage = resource.getrusage(resource.RUSAGE_SELF)
print(f"CHILD {usage.ru_utime + usage.ru_stime:.3f} {','.join(heavy) or '-'}")
sys.exit(status)
"""


class Ended(NamedTuple):
    status: int
    stdout: str
    stderr: str
    cpu_s: float
    heavy: str


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A recipe with all that it names, in verl's schema."""
    (tmp_path / "recipe.py").write_text(RECIPE)
    (tmp_path / "rewards.py").write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n    return 1.0\n"
    )
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    row = {
        "data_source": "sums",
        "prompt": [{"role": "user", "content": "1+1="}],
        "reward_model": {"style": "rule", "ground_truth": "2"},
    }
    pq.write_table(pa.Table.from_pylist([row] * 32), tmp_path / "train.parquet")
    return tmp_path


def asyncrl(folder: Path, *arguments: str) -> Ended:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *arguments],
        cwd=folder,
        env={**environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    stdout, _, tail = done.stdout.rpartition("CHILD ")
    cpu_s, heavy = tail.split()
    print(f"{cpu_s} s of CPU: {' '.join(arguments)}\n{done.stderr}")
    return Ended(done.returncode, stdout, done.stderr, float(cpu_s), heavy)


MISTAKES = {
    "typo in an override": (
        ["learner.learning_rte=1e-5", "--dry-run"],
        ["'learner.learning_rte=1e-5'", "learner has no field 'learning_rte'", "Valid: lr, betas"],
    ),
    "near typo in an override": (["learner.batch_group=4"], ["did you mean 'batch_groups'?"]),
    "value of another type": (["sampling.n=abc"], ["sampling.n must be int", "'abc'"]),
    "unknown field in the deployment": (
        ["--deploy", "deploy.yaml"],
        ["deploy.yaml, line 3", "generators.coutn=2", "did you mean 'count'?"],
    ),
    "missing data file": (["data.files=[trian.parquet]"], ["trian.parquet", "did you mean", "train.parquet"]),
    "wrong column": (["data.prompt_key=question"], ["train.parquet, row 0", "no column 'question'", "prompt, reward_model"]),
    "batch that can never be admitted": (
        ["staleness.reserve_ahead=0"],
        ["staleness.reserve_ahead=0 < 1 batch", "wait for ever", "use at least 1, or 'auto'"],
    ),
    "GPUs on a machine without": (
        ["deploy.learner.place.gpus=1", "deploy.generators.place.gpus=1"],
        ["learner 1 0 1", "demanded 0 2", "available", "lower `place`"],
    ),
    "value out of bounds": (["evaluation.freq=0"], ["evaluation.freq=0 < 1"]),
    "reward function that does not exist": (["reward.function=rewards.py:compute_scor"], ["did you mean 'compute_score'?"]),
    "rollouts longer than the engine takes": (["data.max_prompt_length=2000"], ["2000", "2064 tokens > ", "max_length=2048"]),
    "two mistakes at once": (
        ["data.files=[none.parquet]", "reward.function=none.py:f"],
        ["2 problems:", "1. no data file", "none.parquet", "2. reward.function=", "none.py"],
    ),
}


def test_a_directory_that_was_deleted_is_named(folder: Path) -> None:
    script = "import os, sys; os.mkdir('gone'); os.chdir('gone'); os.rmdir('../gone')\n" + CHILD
    done = subprocess.run(
        [sys.executable, "-c", script, "run", str(folder / "recipe.py")],
        cwd=folder, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    told = "error: the directory in which this command was started has been deleted; start it in one that stays\n"
    assert done.stderr == told


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_costs_one_screen_and_no_torch(folder: Path, name: str) -> None:
    (folder / "deploy.yaml").write_text("# two generators\ngenerators:\n  coutn: 2\n")
    arguments, expected = MISTAKES[name]
    ended = asyncrl(folder, "run", "recipe.py", *arguments)
    assert ended.status == 2
    assert ended.stdout == ""
    assert ended.stderr.startswith("error: ")
    assert "Traceback" not in ended.stderr
    assert len(ended.stderr.splitlines()) <= 24
    said = " ".join(ended.stderr.split())  # tables are aligned
    for words in expected:
        assert words in said
    assert ended.heavy == "-"
    assert ended.cpu_s < 5.0  # CPU time: the machine may be busy with something else
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--data", "train.parquet"], "train.parquet, row 0: no column 'response' (data.response_key='response')"),
        (["--data", "train.parquet", "learning_rate=1"], "SFTSpec has no field 'learning_rate'"),
        (["--data", "trian.parquet"], "no data file"),
    ],
)
def test_a_mistake_in_a_warm_start_costs_no_torch_either(folder: Path, arguments: list[str], expected: str) -> None:
    ended = asyncrl(folder, "sft", "model", "warm", *arguments)
    assert (ended.status, ended.stdout, ended.heavy) == (2, "", "-")
    assert expected in ended.stderr
    assert ended.cpu_s < 5.0
    assert sorted(path.name for path in folder.iterdir()) == ["model", "recipe.py", "rewards.py", "train.parquet"]


def test_dry_run_prints_the_plan_and_starts_nothing(folder: Path) -> None:
    ended = asyncrl(
        folder, "run", "recipe.py", "--name", "first", "--runs-dir", "out", "learner.lr=1e-5", "--dry-run", "seed=3"
    )
    assert ended.status == 0, ended.stderr
    assert str(folder / "out/first") in ended.stdout
    assert "10 updates × 8 groups × 4 rollouts" in ended.stdout
    assert "hold: no trained token is ever more than max_lag=16 updates old; usually 5 or less" in ended.stdout
    assert "reserve_ahead=6 batches (48 groups)" in ended.stdout  # 256 slots hold eight, of which four count
    assert ended.heavy == "-"
    assert ended.cpu_s < 5.0
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["recipe.py", "--resume"], 0, ""),
        (["recipe.py", "--resume", "learner.lr=1e-5"], 0, ""),  # no step
        (["--resume", "recipe.py", "seed=3"], 0, ""),
        (["recipe.py", "--resume", "50", "learner.lr=1e-5"], 0, ""),
        (["--resume", "50", "recipe.py"], 0, ""),
        (["recipe.py", "--resume", "75"], 2, "no checkpoint of update 75; resume from one of step_000050, step_000100"),
        (["recipe.py", "50"], 2, "recipe.py 50: expected a recipe file and overrides a.b=c, and a number only once, after"),
        (["--resume", "50"], 2, "50: expected a recipe file"),
        (["recipe.py", "--resume", "--name", "none"], 2, "none holds no checkpoint: nothing to resume"),
    ],
)  # fmt: skip
def test_the_checkpoint_to_resume_from_may_be_named(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    status: int,
    said: str,
) -> None:
    monkeypatch.chdir(folder)
    for update in (50, 100):
        step = folder / f"runs/sums/checkpoints/step_{update:06d}"
        (step / "policy").mkdir(parents=True)
        (step / "training_state.json").write_text("{}")
        write_manifest(step, {"update": update, "incarnation": 1}, {})
    assert cli.main(["run", "--dry-run", *arguments]) == status
    assert said in capsys.readouterr().err


def test_a_reader_that_leaves_early_ends_it_quietly(folder: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)  # as `| head -1` does once it has its line
    arguments = [sys.executable, "-m", "asyncrl.cli", "run", "recipe.py", "--dry-run"]
    done = subprocess.run(arguments, cwd=folder, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")  # 128 + SIGPIPE


@pytest.mark.parametrize("where", ["elsewhere/recipe.py", "recipe.py"])
def test_a_missing_recipe(folder: Path, where: str) -> None:
    (folder / "recipe.py").rename(folder / "other.py")
    ended = asyncrl(folder, "run", where, "--dry-run")
    assert ended.status == 2
    assert f"recipe {where}: cannot be read" in ended.stderr
    assert ("other.py" in ended.stderr) == (where == "recipe.py")


def test_version_and_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, status in ((["--version"], 0), (["--help"], 0), ([], 2), (["trian"], 2)):
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code == status
    assert "asyncrl 0.1.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConfigError("x"), 2),
        (DataError("x"), 2),
        (ActorFailed("learner: hf_0123456789abcdefXYZ"), 1),
        (OSError(errno.ENOSPC, "No space left on device"), 1),
        (DiskFull("no room for runs/x/replay"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_status(
    error: BaseException, status: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "failing_job.py").write_text(FAILING_JOB)
    monkeypatch.syspath_prepend(str(tmp_path))
    import failing_job

    failing_job.ERROR = error
    monkeypatch.setitem(cli.JOBS, "run", ("failing_job:add", "fails"))
    assert cli.main(["run"]) == status
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Traceback" not in printed.err
    assert "hf_" not in printed.err  # secrets are masked in errors too
    monkeypatch.delitem(sys.modules, "failing_job")


INTERRUPTED = """
import sys

class Interrupt:  # at the first import of something slow
    def find_spec(self, name, path=None, target=None):
        if name == "msgspec":
            sys.meta_path.remove(self)
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupt())
from asyncrl.cli import main
sys.exit(main(["doctor"]))
"""


def test_an_interrupt_while_it_still_imports_is_told_in_a_line() -> None:
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_a_wrong_log_level_names_the_right_ones(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LOG_LEVEL", "verbose")
    assert cli.main(["doctor"]) == 2
    assert "LOG_LEVEL='verbose' is no level" in capsys.readouterr().err
