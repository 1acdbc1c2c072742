"""Whole runs through the command line, as a person starts, interrupts, kills and resumes them; and as a Ray job."""

import json
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from asyncrl.generate.sglang.process import free_port
from asyncrl.processes import ENDING
from asyncrl.rundir import RunDir

pytestmark = pytest.mark.ray

RECIPE = """
from asyncrl.config import *

recipe = Recipe(
    name="tiny",
    model=ModelSpec(path="./model"),
    data=DataSpec(files=("train.jsonl",), answer_key="answer"),
    reward=RewardSpec(function="sevens.py:compute_score"),
    sampling=SamplingSpec(n=4, max_response_length=6),
    learner=LearnerSpec(batch_groups=4, lr=1e-3),
    evaluation=EvaluationSpec(files=("train.jsonl",), limit=8, freq=3),
    checkpoint=CheckpointSpec(save_freq=3),
    total_steps=6,
)
"""
REWARDS = """
import time

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return solution_str.count(ground_truth) / 6

def slow(*sample):
    time.sleep(0.02)
    return compute_score(*sample)
"""
ASYNCRL = [sys.executable, "-m", "asyncrl.cli"]
# The same, which tells at its end what the driver has imported.
TELLING = """
import sys
from asyncrl.cli import main
status = main()
print("imported:", sorted(name for name in ("ray", "torch", "transformers") if name in sys.modules), file=sys.stderr)
sys.exit(status)
"""
ENDLESS = ("total_steps=100000", "reward.function=sevens.py:slow")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A folder as a user has one: recipe, reward, data, model; runs go to its `runs`."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "recipe.py").write_text(RECIPE)
    (folder / "sevens.py").write_text(REWARDS)
    rows = [{"prompt": f"{i:02d}+{7 * i % 100:02d}=", "data_source": "sevens", "answer": "7"} for i in range(64)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(tiny_model, folder / "model")
    return folder


class Command:
    """A command in a process of its own. Every process that comes of it is known by a mark in its environment."""

    def __init__(self, folder: Path, *arguments: str, **environ: str) -> None:
        self._mark = f"ASYNCRL_TEST={secrets.token_hex(8)}"
        name, _, value = self._mark.partition("=")
        inherited = {key: text for key, text in os.environ.items() if not key.startswith(("RAY_", "LOG_LEVEL"))}
        outputs = folder / "outputs"
        outputs.mkdir(exist_ok=True)
        self._stdout, self._stderr = outputs / f"{value}.out", outputs / f"{value}.err"
        with self._stdout.open("wb") as out, self._stderr.open("wb") as err:
            self.process = subprocess.Popen(
                arguments, cwd=folder, env={**inherited, **environ, name: value}, stdout=out, stderr=err, process_group=0
            )

    @property
    def stdout(self) -> str:
        return self._stdout.read_text()

    @property
    def stderr(self) -> str:
        return self._stderr.read_text()

    def end(self, timeout_s: float = 90.0) -> int:
        """Waits for the exit status; prints what was printed, for a test that fails."""
        try:
            return self.process.wait(timeout_s)
        finally:
            print(f"{self.process.args}: {self.process.poll()}\n{self.stdout}{self.stderr}")

    def until(self, true: Callable[[], bool]) -> None:
        """Waits until something holds while the command runs."""
        wait_until(lambda: true() or self.process.poll() is not None, 90.0)
        assert self.process.poll() is None, self.stderr

    def left(self) -> list[int]:
        """Pids of what came of this command and still lives."""
        return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit() and self._lives(entry)]

    def kill(self) -> None:
        for pid in self.left():
            os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def _lives(self, entry: Path) -> bool:
        try:
            marked = self._mark.encode() in (entry / "environ").read_bytes().split(b"\0")
            return marked and (entry / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:  # ended meanwhile
            return False


# These two look for their dead cluster for a minute before they end; "" has ended already.
RAY_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent", "")


@pytest.fixture
def command() -> Iterator[Callable[..., Command]]:
    begun: list[Command] = []

    def begin(*arguments: str | Path, **environ: str) -> Command:
        folder, *rest = arguments
        begun.append(Command(Path(folder), *map(str, rest), **environ))
        return begun[-1]

    yield begin
    for each in begun:
        each.kill()


def process_name(pid: int) -> str:
    """The title of a process; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().rstrip("\0 ")
    except OSError:
        return ""


def wait_until(true: Callable[[], bool], timeout_s: float) -> None:
    """Looks until it is true: other processes' files and ends send no word."""
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, f"not true within {timeout_s} s"
        time.sleep(0.05)


def start(command: Callable[..., Command], project: Path, name: str, *more: str) -> Command:
    return command(project, *ASYNCRL, "run", "recipe.py", "--name", name, "deploy.limits.poll_s=0.5", *more)


def metrics(run: RunDir, kind: str) -> list[dict]:
    lines = run.metrics.read_text().splitlines() if run.metrics.exists() else []
    whole = [json.loads(line) for line in lines if line.endswith("}")]
    return [line for line in whole if line["kind"] == kind]


def steps(run: RunDir) -> list[int]:
    return [line["step"] for line in metrics(run, "step")]


@pytest.fixture(scope="module")
def finished(project: Path) -> RunDir:
    """A run that went to its end; one line of JSON on standard output, nothing left behind, and a driver without torch."""
    telling = [sys.executable, "-c", TELLING]
    whole = Command(project, *telling, "run", "recipe.py", "--name", "finished", "deploy.limits.poll_s=0.5")
    try:
        assert whole.end() == 0
        wait_until(lambda: whole.left() == [], 30)
    finally:
        whole.kill()
    (line,) = whole.stdout.splitlines()
    result = json.loads(line)
    run = RunDir(project / "runs" / "finished")
    assert (result["run_dir"], result["steps"], result["samples"]) == (str(run.path), 6, 6 * 4 * 4)
    assert result["max_trained_lag"] <= 16
    assert result["restarts"] == {}
    assert "|" not in whole.stderr, "a progress bar"
    assert "imported: ['ray']" in whole.stderr.splitlines()
    return run


def test_a_run_leaves_a_whole_run_directory(finished: RunDir) -> None:
    assert {entry.name for entry in finished.path.iterdir() if not entry.name.startswith(".")} == {
        *("recipe.json", "deployment.yaml", "facts.json", "ended.json", "metrics.jsonl", "tensorboard"),
        *("data", "replay", "checkpoints", "exports", "logs"),
    }
    assert steps(finished) == [1, 2, 3, 4, 5, 6]
    evaluated = [line["step"] for line in metrics(finished, "eval")]
    # One in between is taken at a later version, or given up, where updates come faster than a generator can take each.
    assert (evaluated[0], evaluated[-1]) == (0, 6)
    assert all(3 <= step <= 6 for step in evaluated[1:-1])
    assert len(evaluated) <= 3
    assert [folder.name for folder in finished.steps()] == ["step_000003", "step_000006"]
    assert list(finished.tensorboard.glob("events.out.tfevents.*"))


def test_eval_says_the_same_twice_and_what_the_run_said(
    finished: RunDir, project: Path, command: Callable[..., Command]
) -> None:
    asked = ("eval", finished.path, "--data", "train.jsonl", "--reward", "sevens.py", "--limit", "8")
    both = [command(project, *ASYNCRL, *asked) for _ in range(2)]
    assert [each.end() for each in both] == [0, 0]
    assert both[0].stdout == both[1].stdout
    first = json.loads(both[0].stdout)
    assert first["samples"] == 8
    # Greedy, over the same prompts; batched differently, so a near tie may fall the other way.
    assert first["score"] == pytest.approx(metrics(finished, "eval")[-1]["eval/score"], abs=0.1)


def test_an_exported_checkpoint_loads_with_equal_logits(
    finished: RunDir, project: Path, command: Callable[..., Command], tmp_path: Path
) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "exported"
    exported = command(project, *ASYNCRL, "export", finished.steps()[0], out)
    assert exported.end() == 0
    assert exported.stdout.strip() == str(out)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "12+34="}], tokenize=False, add_generation_prompt=True)
    assert text == "<user>12+34=<assistant>"
    ids = torch.tensor([tokenizer.encode(text)])
    with torch.no_grad():
        before = model(ids).logits
        trained = load_file(finished.steps()[0] / "policy" / "model.safetensors")
        model.load_state_dict(trained, strict=False)  # the head is tied, and not among them
        assert torch.equal(model(ids).logits, before)
        model.load_state_dict(load_file(project / "model" / "model.safetensors"), strict=False)
        assert not torch.equal(model(ids).logits, before), "the policy never changed"


def interrupt(running: Command, number: signal.Signals = signal.SIGINT) -> None:
    """Ctrl-C goes to whatever is in the command's process group, SIGTERM to the command."""
    (os.killpg if number is signal.SIGINT else os.kill)(running.process.pid, number)


def test_ctrl_c_saves_and_stops_everything_and_resume_goes_on_from_exactly_there(
    project: Path, command: Callable[..., Command]
) -> None:
    run = RunDir(project / "runs" / "interrupted")
    running = start(command, project, "interrupted", *ENDLESS, "checkpoint.save_freq=1000")
    running.until(lambda: len(steps(run)) >= 2)
    assert len(running.left()) > 5
    interrupt(running)
    assert running.end(90) == 130
    assert running.stdout == ""
    assert "Traceback" not in running.stderr
    wait_until(lambda: running.left() == [], 30)
    saved = run.steps()[-1]
    last = RunDir.update_of(saved)
    assert steps(run) == list(range(1, last + 1)), "what was made, saved and told is the same"
    options = f"{ENDLESS[0]} {ENDLESS[1]} checkpoint.save_freq=1000 --name interrupted --resume"
    assert running.stderr.rstrip().splitlines()[-2:] == [
        f"interrupted: update {last} is saved in {saved}",
        f"to go on: asyncrl run recipe.py deploy.limits.poll_s=0.5 {options}",
    ]

    resumed = start(command, project, "interrupted", "--resume", *ENDLESS)
    resumed.until(lambda: len(steps(run)) >= last + 2)
    assert f"resumed from {saved.name}: 0 later batches are trained again first" in resumed.stderr
    assert f"step {last}/100000 · " in resumed.stderr
    assert "step 0/100000" not in resumed.stderr
    interrupt(resumed)
    interrupt(resumed, signal.SIGTERM)  # and at once
    assert resumed.end(30) == 130
    assert "interrupted again: ending at once" in resumed.stderr
    assert resumed.stderr.rstrip().splitlines()[-1].startswith("to go on: asyncrl run recipe.py ")
    assert "Traceback" not in resumed.stderr
    wait_until(lambda: resumed.left() == [], 30)
    made = [(line["step"], line["incarnation"]) for line in metrics(run, "step")]
    assert made == [(step, 1 if step <= last else 2) for step in range(1, len(made) + 1)]


def test_a_detached_run_is_watched_asked_about_scaled_stopped_and_can_go_on(
    project: Path, command: Callable[..., Command]
) -> None:
    run = RunDir(project / "runs" / "detached")
    detaching = start(command, project, "detached", *ENDLESS, "checkpoint.save_freq=1000", "--detach")
    assert detaching.end() == 0
    assert "follow  asyncrl attach " in detaching.stdout
    attached = command(project, *ASYNCRL, "attach", run.path)
    leaving = command(project, *ASYNCRL, "attach", run.path)
    attached.until(lambda: len(steps(run)) >= 3)
    attached.until(lambda: "/100000 · time " in attached.stderr)
    leaving.until(lambda: "Ctrl-C leaves it alone" in leaving.stderr)
    interrupt(leaving)
    assert leaving.end() == 130
    assert leaving.stderr.splitlines()[-1].startswith("interrupted: the run goes on; `asyncrl attach ")
    assert detaching.left(), "it went on"

    asked = command(project, *ASYNCRL, "status", "runs/detached", "--json")
    assert asked.end() == 0
    standing = json.loads(asked.stdout)
    pid = detaching.stdout.splitlines()[1].removeprefix("pid     ")
    assert (standing["state"], standing["led_by"].split()[:2], standing["total_steps"]) == ("running", ["pid", pid], 100000)
    assert standing["update"] >= 3
    assert standing["samples_per_s"] > 0
    assert standing["heard_s"] < 30
    assert standing["members"] == {"generator": 1, "learner": 1, "reward": 1, "store": 1}

    scaling = command(project, *ASYNCRL, "scale", "runs/detached", "generators=2")
    assert scaling.end() == 0
    assert scaling.stdout.endswith(": generators=2\n")
    attached.until(lambda: "generator-1 is up" in attached.stderr)

    stopping = command(project, *ASYNCRL, "stop", "runs/detached")
    assert stopping.end() == 0
    wait_until(lambda: detaching.left() == [], 30)
    last = steps(run)[-1]
    assert [run.update_of(folder) for folder in run.steps()] == [0, last], "what was made is saved"
    told, way = stopping.stdout.splitlines()
    assert told == f"{run.path} was stopped after {last} updates; the newest checkpoint is {run.checkpoint(last)}"
    assert attached.end() == 130, "as the run did"
    assert told in attached.stderr
    again = command(project, *ASYNCRL, *shlex.split(way.removeprefix("to go on: asyncrl ")), "--dry-run")
    assert again.end() == 0
    ended = command(project, *ASYNCRL, "status", "runs/detached")
    assert ended.end() == 0
    assert ended.stdout.startswith(f"detached: stopped\n  update {last}/100000 · ")
    assert "interrupted: update" in run.driver_log.read_text()


PREPARE = """
import time
from pathlib import Path

def slow(recipe, run_dir):
    Path(run_dir, "preparing").touch()
    time.sleep(60)
"""


@pytest.mark.parametrize(
    ("during", "number"),
    [
        *(("prepare", number) for number in ENDING),
        ("ray", signal.SIGTERM),
        ("actors", signal.SIGINT),
    ],
)
def test_an_interrupt_before_anything_is_trained(
    project: Path, command: Callable[..., Command], during: str, number: signal.Signals
) -> None:
    (project / "slowly.py").write_text(PREPARE)
    name = f"{during}-{number.name}"
    marks = {
        "prepare": lambda: (project / "runs" / name / "preparing").exists(),
        "ray": lambda: "starting the actors" in starting.stderr,
        "actors": lambda: "store is up" in starting.stderr,
    }
    starting = start(command, project, name, *(["prepare=slowly.py:slow"] if during == "prepare" else []))
    starting.until(marks[during])
    interrupt(starting, number)
    assert starting.end(90) == 130
    assert "Traceback" not in starting.stderr
    assert starting.stderr.rstrip().splitlines()[-1] == "interrupted"
    wait_until(lambda: starting.left() == [], 30)


def test_a_killed_driver_takes_everything_with_it_and_the_run_resumes_until_an_actor_fails_too_often(
    project: Path, command: Callable[..., Command]
) -> None:
    run = RunDir(project / "runs" / "killed")
    running = start(command, project, "killed", *ENDLESS)
    running.until(lambda: len(steps(run)) >= 5)
    running.process.kill()
    running.process.wait()
    wait_until(lambda: all(name in RAY_AGENTS for name in map(process_name, running.left())), 45)
    saved = run.update_of(run.steps()[-1])
    last = max(steps(run)[-1], saved)
    until = last + 10  # the log may be some steps ahead of the metrics

    resumed = start(command, project, "killed", "--resume", *ENDLESS, "deploy.limits.max_restarts=0")
    resumed.until(lambda: steps(run)[-1] >= until)
    (line,) = (line for line in resumed.stderr.splitlines() if "generator-0 is up" in line)
    os.kill(int(line.rpartition("pid ")[2].rstrip(")")), signal.SIGKILL)
    assert resumed.end(90) == 1
    failed = json.loads(resumed.stdout)
    assert failed["error"].startswith("generator-0 failed 1 times")
    assert failed["steps"] >= until
    error = resumed.stderr[resumed.stderr.index("error: ") :]
    assert error.startswith("error: generator-0 failed 1 times within limits.restart_window_s=3600 s, limits.max_restarts=0;")
    assert "\nthe process died" in error
    assert len(error.splitlines()) < 10
    assert "raylet" not in resumed.stderr, "Ray's own page about it"
    assert "the process died" in (run.logs / "generator-0.error").read_text()
    wait_until(lambda: resumed.left() == [], 30)

    trained = {line["step"]: line["incarnation"] for line in metrics(run, "step")}
    assert sorted(trained) == list(range(1, max(trained) + 1))
    assert trained[until] == 2
    lines = [(line["step"], line["incarnation"]) for line in metrics(run, "step")]
    assert min(step for step, incarnation in lines if incarnation == 2) == saved + 1, "not resumed from the newest checkpoint"
    assert len(set(lines)) == len(lines), "a step was written twice"


# ------------------------------------------------------------------------------------------------- as a Ray job


@pytest.fixture
def ray_head(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A Ray of its own on free ports, beside whatever else runs here; yields the environment of its clients."""
    port, dashboard, client, agent = (free_port() for _ in range(4))
    # Ray asks for a token by default; this one is known to nobody else.
    environ = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_COLOR_PREFIX": "0"}
    head = Command(
        tmp_path,
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2", "--disable-usage-stats"),
        *(f"--port={port}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"),
        *(f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}"),
        *("--min-worker-port=0", "--max-worker-port=0"),
        **environ,
    )
    try:
        wait_until(lambda: "Ray runtime started" in head.stdout + head.stderr or head.process.poll() is not None, 60)
        if head.process.poll() is not None:
            pytest.fail(f"`ray start` does not work here:\n{head.stdout}{head.stderr}"[:2000])
        yield {**environ, "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    finally:
        head.process.terminate()
        head.end(90)
        head.kill()


def test_a_run_resumes_to_its_end_as_a_ray_job(
    finished: RunDir, project: Path, ray_head: dict[str, str], command: Callable[..., Command], tmp_path: Path
) -> None:
    submit = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--working-dir", ".", "--"]
    (project / "broken.py").write_text(RECIPE + "\nraise RuntimeError('broken on purpose')\n")
    out = tmp_path / "out"
    run = RunDir(shutil.copytree(finished.path, out / "tiny"))
    further = ("--resume", "total_steps=8", "deploy.limits.poll_s=0.5")  # in a copy of the folder where the run began
    job = command(project, *submit, *ASYNCRL, "run", "recipe.py", "--runs-dir", out, *further, **ray_head)
    assert job.end() == 0
    assert "succeeded" in job.stdout + job.stderr
    (line,) = (line for line in job.stdout.splitlines() if line.startswith("{"))
    result = json.loads(line)
    assert (result["run_dir"], result["steps"], result["samples"]) == (str(run.path), 8, 8 * 4 * 4)
    assert [(line["step"], line["incarnation"]) for line in metrics(run, "step")][-3:] == [(6, 1), (7, 2), (8, 2)]
    assert steps(run) == [1, 2, 3, 4, 5, 6, 7, 8]

    # After it, not beside it: Ray drops the package of a job that has ended, also while another with the same files starts.
    both = ("broken.py", "--runs-dir", str(out)), ("recipe.py",)
    failing = command(
        project, *submit, "sh", "-c", "; ".join(shlex.join([*ASYNCRL, "run", *each]) for each in both), **ray_head
    )
    assert failing.end() == 1
    said = failing.stdout + failing.stderr
    assert "failed" in said
    assert "broken on purpose" in said
    assert "--runs-dir 'runs' is relative, and this is a Ray job" in said
