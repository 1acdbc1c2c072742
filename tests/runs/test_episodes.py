"""Episodes in whole runs: the shipped recipes, in shorter forms, one of them under faults."""

import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import fmean

import pytest
from msgspec.structs import replace
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import asyncrl.replay
from asyncrl import RunResult, launch
from asyncrl.cli import main
from asyncrl.config.load import load_specs
from asyncrl.config.paths import resolve_paths
from asyncrl.report.names import described, table
from asyncrl.report.summary import RunSummary
from asyncrl.rundir import RunDir

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def pointers_run(local_ray, script, tmp_path_factory) -> RunResult:
    """16 of the 100 updates, from a policy that was warmed up for half of the time."""
    module, run = script(RECIPES / "pointers.py"), RunDir(tmp_path_factory.mktemp("runs") / "pointers")
    module.WARM_STEPS = 300
    overrides = ["total_steps=16", "evaluation.freq=16", "evaluation.limit=128"]
    recipe, deployment = load_specs(RECIPES / "pointers.py", None, overrides)
    module.prepare(recipe, run.path)
    return launch(resolve_paths(recipe, run, RECIPES), deployment, runs_dir=run.path.parent)


def test_the_policy_learns_to_ask(pointers_run, metrics_of) -> None:
    """What is to be said stands in the environment's answers alone: at first the policy gives up before it has it."""
    assert pointers_run.first_score <= 0.15
    assert pointers_run.last_score >= 0.8
    steps = metrics_of(pointers_run.run_dir, "step")
    sampled = [line["reward/mean"] for line in steps]
    assert fmean(sampled[:4]) <= 0.25
    assert fmean(sampled[-4:]) >= fmean(sampled[:4]) + 0.06  # greedy play is there long before
    assert max(line.get("gap/logprob_max_abs", 0.0) for line in steps) <= 1e-5  # over all turns
    assert (pointers_run.steps, pointers_run.samples, pointers_run.invalid, pointers_run.timeout) == (16, 16 * 256, 0, 0)


def test_rows_are_conversations_as_they_were_read_and_sampled(pointers_run) -> None:
    tokenizer = AutoTokenizer.from_pretrained(Path(pointers_run.run_dir) / "data/warm")
    columns = ["prompt_ids", "response_ids", "loss_mask", "turns", "segments", "episode", "reward", "trained_update"]
    rows = [row for row in asyncrl.replay.open(pointers_run.run_dir).rollouts(columns).to_pylist() if row["trained_update"]]
    assert len(rows) == 16 * 256
    whole = 0
    for row in rows:
        episode = json.loads(row["episode"])
        messages = json.loads(episode["messages"])
        said = [message["content"] for message in messages if message["role"] == "assistant"]
        ids = row["prompt_ids"] + row["response_ids"]
        assert (row["segments"], len(row["turns"]), row["reward"]) == (None, len(said), episode["reward"])
        sampled = [token for token, mine in zip(row["response_ids"], row["loss_mask"], strict=True) if mine]
        assert tokenizer.decode(sampled, skip_special_tokens=True).split() == " ".join(said).split()
        ended = sampled.count(1) == len(said)  # every answer by itself
        if ended and all(said) and not {0, 2, 3, 4} & {*sampled}:  # no token in it that its text does not show
            rendered = tokenizer.apply_chat_template(messages, return_dict=False)
            assert rendered[: len(ids)] == ids
            whole += 1
    assert whole >= len(rows) // 2


def test_the_run_says_how_its_episodes_went(pointers_run, metrics_of) -> None:
    for line in metrics_of(pointers_run.run_dir, "step"):
        assert 1 <= line["num_turns/min"] <= line["num_turns/mean"] <= line["num_turns/max"] <= 4
        assert line["episode/stop/done"] + line["episode/stop/max_turns"] == pytest.approx(1.0)
        assert (line["episode/status/ok"], line["episode/segments"], line["tools/call_frequency"]) == (1.0, 1.0, 0.0)
        assert line["episode/tokens"] == pytest.approx(line["response_length/mean"])
        assert line["episode/environment_s"] > 0
    evaluations = metrics_of(pointers_run.run_dir, "eval")
    assert [line["step"] for line in evaluations] == [0, 16]
    assert all(line["step"] <= line["eval/oldest_update"] <= line["eval/newest_update"] for line in evaluations)
    assert evaluations[1]["eval/newest_update"] == 16  # nothing is newer
    assert evaluations[1]["eval/num_turns/mean"] > evaluations[0]["eval/num_turns/mean"] + 0.5  # it has learned to ask


# of SGLang, of models of rewards, and what arises where something waits, fails or is not asked for
SELDOM = ("<model>/", "<rank>/", "learner/critic", "learner/reference_bytes", "<generator>/engine/", "<generator>/waits/")
SELDOM += ("eval/pass@", "eval/metric/", "eval/score/")


def test_every_figure_is_documented_and_what_is_documented_is_there(pointers_run, metrics_of) -> None:
    """Figures of updates beside episodes: tests/learn/test_metric_names.py."""
    lines = [line for kind in ("step", "eval", "actors") for line in metrics_of(pointers_run.run_dir, kind)]
    names = {name for line in lines for name in line} - {"sequence", "time", "kind", "step", "incarnation"}
    rows = {name: described(name) for name in names}
    assert [name for name, known in rows.items() if known is None] == []
    documented = {name for row in table() if row.kind in ("evaluation", "actors") for name in row.each()}
    documented |= {name for row in table() for name in row.each() if name.startswith(("num_turns/", "tools/", "episode/"))}
    missing = documented - {known.name for known in rows.values() if known is not None}
    assert {name for name in missing if not name.startswith(SELDOM)} == set()


def test_asyncrl_eval_plays_what_the_run_played(pointers_run, tmp_path, capsys) -> None:
    out = tmp_path / "samples.parquet"
    asked = ["eval", pointers_run.run_dir, "--limit", "128", "--reward-processes", "1", "--device", "cpu", "--out", str(out)]
    assert main(asked) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["score"] == pytest.approx(pointers_run.last_score, abs=0.05)  # greedy, in other batches
    told = [json.loads(line) for line in out.with_suffix(".jsonl").open()]
    assert len(told) == report["samples"] == 128
    for one in told:
        said = [message["content"] for message in one["messages"] if message["role"] == "assistant"]
        assert len(said) == one["turns"] == len(one["turn_rewards"])
        assert one["reward"] == sum(one["turn_rewards"])


# ------------------------------------------------------------------------------------------- under faults


class Processes:
    """Those of this machine, at one moment: parent and group by number."""

    def __init__(self) -> None:
        self.parents: dict[int, int] = {}
        self.groups: dict[int, int] = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):  # it ended meanwhile
                state, parent, group = stat.read_text().rpartition(")")[2].split()[:3]
                if state not in "ZX":
                    pid = int(stat.parent.name)
                    self.parents[pid], self.groups[pid] = int(parent), int(group)

    def below(self, ancestor: int) -> set[int]:
        found, above = set[int](), {ancestor}
        while above:
            above = {pid for pid, parent in self.parents.items() if parent in above}
            found |= above
        return found

    def at_work(self, generator: int) -> list[int]:
        """The groups of a generator's episodes that run a program, each led by the episode's process."""
        programs = {pid for pid in self.below(generator) if "RLIMIT_FSIZE" in command(pid)}
        return sorted({self.groups[pid] for pid in programs} - programs)


def command(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text()
    return ""


class Faults:
    """While programs wait for the gate: one episode dies, one hangs, and with it the generator dies; of the next one another
    episode hangs. The learner goes on when that has passed its deadline."""

    def __init__(self, gate: Path, release: Callable[[], None]) -> None:
        self.gate, self.release = gate, release
        self.seen: set[int] = set()  # generators, and all below them
        self.stage, self._killed = 0, 0

    def __call__(self, run: RunSummary) -> None:
        pid = run.pids.get("generator-0")
        if pid is None:
            return
        processes = Processes()
        at_work = processes.at_work(pid)
        self.seen |= {pid, *processes.below(pid)}
        if self.stage == 0 and len(at_work) >= 3:
            os.kill(at_work[0], signal.SIGKILL)
            os.kill(at_work[1], signal.SIGSTOP)
        elif self.stage == 1 and run.failures.invalid:
            os.kill(pid, signal.SIGKILL)
            self._killed = pid
        elif self.stage == 2 and pid != self._killed and at_work:
            os.kill(at_work[0], signal.SIGSTOP)
            self.gate.touch()
        elif self.stage == 3 and run.failures.timeout:
            self.release()
        else:
            return
        self.stage += 1


@pytest.fixture
def calling(tmp_path: Path) -> tuple[Path, Path]:
    """A tokenizer whose words are calls of the tool and answers, and the file that its programs wait for."""
    gate = tmp_path / "gate"
    code = f"import os, time\nwhile not os.path.exists({str(gate)!r}): time.sleep(0.01)\nprint(6 * 7)"
    calls = [{"code": code}, {"code": code + " "}, {"code": code + "  "}, {"code": "1 / 0"}, {"program": "1"}]
    said = [f"<tool_call>{json.dumps({'name': 'python', 'arguments': one})}</tool_call>" for one in calls]
    words = ["<pad>", "<eos>", "<user>", "<assistant>", "<tool>", *said, "42", "so", "####", "it", "is", "42.0", "?"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", additional_special_tokens=words[2:5]
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}<eos>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "calling")
    return tmp_path / "calling", gate


def test_programs_run_and_nothing_is_lost_or_left_when_episodes_and_their_generator_die_and_hang(
    local_ray, tiny_model, calling, hold_after, events_of, assert_nothing_lost, tmp_path
) -> None:
    """recipes/gsm8k_tools.py, with a random policy."""
    tokenizer, gate = calling
    problems = [{"question": f"What is 6*7, {i}?", "answer": "#### 42"} for i in range(64)]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    small = ["data.max_prompt_length=32", "sampling.n=2", "sampling.max_response_length=4", "sampling.temperature=3"]
    short = ["learner.batch_groups=4", "total_steps=6", "evaluation.files=[]", "episode.step_deadline_s=3"]
    deployed = ["deploy.generators.engine.slots=16", "deploy.limits.poll_s=0.5"]
    names = [f"arguments={{source: {tmp_path}}}", f"model.path={tiny_model}", f"model.tokenizer={tokenizer}"]
    recipe, deployment = load_specs(RECIPES / "gsm8k_tools.py", None, [*names, *small, *short, *deployed])
    hold = hold_after(2)
    faults = Faults(gate, hold.release)
    recipe = replace(resolve_paths(recipe, RunDir(tmp_path / "run"), RECIPES), algorithm=hold.algorithm)
    result = launch(recipe, deployment, name="run", runs_dir=tmp_path, observe=faults)

    assert faults.stage == 4
    assert (result.steps, result.restarts) == (6, {"generator-0": 1})
    assert_nothing_lost(events_of(result.run_dir), result)
    rows = [row for row in asyncrl.replay.open(result.run_dir).rollouts().to_pylist() if row["status"]]  # scored by the end
    ended = [(row["status"], row["reward"], json.loads(row["episode"])) for row in rows]
    assert {status for status, *_ in ended} == {"ok", "invalid", "timeout"}
    errors = {status: episode["error"] for status, _, episode in ended}
    assert errors["invalid"].startswith("the environment's process died")
    assert "within episode.step_deadline_s=3" in errors["timeout"]
    messages = [json.loads(episode["messages"]) for *_, episode in ended]
    heard = {message["content"] for told in messages for message in told if message["role"] == "tool"}
    assert {"42", "error: RuntimeError: ZeroDivisionError: division by zero"} < heard
    right = [told[-1] for told, (_, reward, _) in zip(messages, ended, strict=True) if reward == 1.0]
    assert right
    assert all("42" in last["content"] and "tool_calls" not in last for last in right)
    assert {reward for status, reward, episode in ended if status == "ok" and episode["stop"] != "done"} == {0.0}
    assert_gone(faults)


def assert_gone(faults: Faults) -> None:
    """The generators, all that was below them, and their groups: with them what they had open."""
    deadline = time.monotonic() + 20
    while left := {pid for pid, group in Processes().groups.items() if {pid, group} & faults.seen}:
        assert time.monotonic() < deadline, {pid: command(pid) for pid in left}
        os.sched_yield()
