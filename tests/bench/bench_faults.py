"""Faults by the hundred, in whole runs under Ray: `python tests/bench/bench_faults.py --faults 1000 [--seed 0] [--out FILE]`.

Each run is one of a tiny model, drawn by its seed (max_lag, how often it saves, ranks of the learner), which meets several
faults, one after the other has been recovered from: an actor killed or stopped (SIGKILL, SIGSTOP, SIGSTOP with a late SIGCONT),
at its start, while it trains or at its end; the driver killed, and the run resumed; the disk full, which ends the run with an
error that must be there within 30 s, and the run resumed; the wall clock set an hour ahead or back (clock_ahead.c); the
loopback interface cut or slow (a network namespace of its own). What needs root or a compiler is left out without, and said.

After each run its log is read: every row that was acknowledged is there, no group trained twice, no token past the bound, every
reservation ended once. The table says of each kind how many, with what outcome, and how long it took to the next update: if an
actor was killed or stopped, to one after its restart was counted (which is waited for for 40 s at most). FILE gets a line of
JSON per fault; a campaign that is given the same file goes on where it ended.
"""

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

MARK = "ASYNCRL_FAULTS"  # in the environment of all processes of a run
DISK_MIB, NOTICED_S, RECOVER_S, NAMED_S = 48, 40.0, 150.0, 30.0
RAYS_OWN = ("ray::IDLE", "ray::RuntimeEnvAgent", "ray::DashboardAgent")
REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return solution_str.count("7") / 24
"""


# ------------------------------------------------------------------------------------------------- a run


def lead(folder: Path, settings: dict[str, Any], resume: bool) -> None:
    """The driver: trains until the file `enough` is there, then finishes. Tells how it stands, a line per round."""
    from asyncrl import Trainer
    from asyncrl.config import (
        CheckpointSpec,
        DataSpec,
        Deployment,
        EvaluationSpec,
        LearnerSpec,
        LimitsSpec,
        ModelSpec,
        RanksSpec,
        Recipe,
        RewardSpec,
        SamplingSpec,
        StalenessSpec,
        StoreSpec,
    )
    from asyncrl.errors import AsyncRLError

    def tell(**what: Any) -> None:
        print(json.dumps(what), flush=True)

    limits = LimitsSpec(poll_s=0.5, health_timeout_s=8.0, lease_s=5.0, max_restarts=1000, stop_timeout_s=5.0)
    ranks, store = RanksSpec(ranks=settings["ranks"]), StoreSpec(segment_bytes=1 << 18)
    deployment = Deployment(limits=limits, learner=ranks, store=store)
    prompts = str(folder / "train.jsonl")
    recipe = Recipe(
        name="run",
        model=ModelSpec(path=str(folder / "model")),
        data=DataSpec(files=(prompts,), answer_key="answer", max_prompt_length=8),
        reward=RewardSpec(function=f"{folder}/sevens.py:compute_score"),
        sampling=SamplingSpec(n=4, max_response_length=24),
        staleness=StalenessSpec(max_lag=settings["max_lag"]),
        learner=LearnerSpec(batch_groups=4, lr=1e-4),
        evaluation=EvaluationSpec(files=(prompts,), freq=20),
        checkpoint=CheckpointSpec(save_freq=settings["save_freq"], keep_last_n=2),
        total_steps=1_000_000,
    )

    def observe(run: Any) -> None:
        tell(committed=run.committed, pids=run.pids, restarts=sum(run.restarts.values()))

    try:
        with Trainer(
            recipe,
            deployment,
            runs_dir=folder / "runs",
            resume_from=folder / "runs/run" if resume else None,
            observe=observe,
            progress=False,
        ) as trainer:
            while not (folder / "enough").exists():
                trainer.fit(10)
            tell(finishing=True)
            result = trainer.finish()
        tell(ended=True, steps=result.steps, lag=result.max_trained_lag, pending=result.pending, trained=result.trained)
        tell(settled=result.trained + result.filtered + result.evicted + result.failed + result.unused)
    except AsyncRLError as error:
        tell(error=f"{type(error).__name__}: {error}")
        sys.exit(1)


class Driver:
    """A process that leads the run, and what it said last. New once a driver was killed or has ended."""

    def __init__(self, folder: Path, settings: dict[str, Any], can: "Can") -> None:
        self.folder, self._settings, self._can = folder, settings, can
        self.clock, self.said = folder / "clock", dict[str, Any]()
        self.start(resume=False)

    def start(self, resume: bool) -> None:
        self.set_clock(0)
        self.said = {"committed": self.said.get("committed", 0) if resume else 0, "pids": {}}
        command = [sys.executable, __file__, "--lead", str(self.folder), json.dumps(self._settings), str(int(resume))]
        if self._can.net:
            command = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *command]
        env = {**os.environ, MARK: str(self.folder)}
        if self._can.clock:
            env |= {"LD_PRELOAD": str(self.folder / "clock_ahead.so"), "CLOCK_AHEAD": str(self.clock)}
        self.log = (self.folder / "driver.log").open("ab")
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self.log, env=env, start_new_session=True)
        self._reader = threading.Thread(target=self._read, args=(self.process, self.said), daemon=True)
        self._reader.start()

    def _read(self, process: Any, said: dict[str, Any]) -> None:
        for line in process.stdout:
            with suppress(ValueError):
                said.update(json.loads(line))

    def until(self, condition: Callable[[], Any], seconds: float) -> bool:
        """Waits for what the driver says, or for its end."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if condition():
                return True
            if self.process.poll() is not None:
                self._reader.join()
                return bool(condition())
            time.sleep(0.05)
        return False

    @property
    def committed(self) -> int:
        return int(self.said.get("committed", 0))

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        self.log.close()

    def set_clock(self, ahead_s: int) -> None:
        with self.clock.open("r+b" if self.clock.exists() else "wb") as file:  # in place: it is mapped
            file.write(struct.pack("q", ahead_s))

    def in_net(self, *command: str) -> None:
        subprocess.run(["nsenter", "-t", str(self.process.pid), "-n", *command], check=True)


# ------------------------------------------------------------------------------------------------- faults


@dataclass
class Can:
    """What this machine lets the campaign do."""

    disk: bool
    net: bool
    clock: bool

    @classmethod
    def find(cls) -> "Can":
        root = os.geteuid() == 0
        net = (
            root and subprocess.run(["unshare", "--net", "ip", "link", "set", "lo", "up"], capture_output=True).returncode == 0
        )
        return cls(disk=root, net=net, clock=shutil.which("cc") is not None)


@dataclass
class Fault:
    kind: str
    run: int
    phase: str
    at: int  # updates committed
    outcome: str = ""
    recovery_s: float = 0.0
    problems: list[str] = field(default_factory=list)


class Campaign:
    def __init__(self, seed: int, folder: Path, can: Can) -> None:
        self.random, self.folder, self.can, self.number = random.Random(seed), folder, can, seed
        self.settings = {
            "max_lag": self.random.choice([0, 2, 4]),
            "save_freq": self.random.choice([1, 1, 5, 1000]),
            "ranks": self.random.choice([1, 1, 1, 2]),
        }
        self.driver = Driver(folder, self.settings, can)

    def kinds(self) -> list[str]:
        actors = ["generator-0", "reward-0", "store", "learner"] + ["learner-1"] * (self.settings["ranks"] > 1)
        kinds = [f"{how} {actor}" for actor in actors for how in ("kill", "kill", "stop", "pause")] + ["kill driver"] * 3
        kinds += ["disk full"] * (2 * self.can.disk) + ["cut link", "slow link"] * self.can.net
        return kinds + ["clock +1 h", "clock -1 h"] * self.can.clock

    def next(self, first: bool, last: bool) -> Fault:
        """Some updates after the one before, or right after its recovery; the last one perhaps while the run finishes."""
        driver, calm = self.driver, self.random.randint(0, 8)
        goal = driver.committed + calm
        if self.random.random() < 0.8 and not first:
            driver.until(lambda: driver.committed >= goal, RECOVER_S)
        if last and self.random.random() < 0.5:
            (self.folder / "enough").touch()
            driver.until(lambda: driver.said.get("finishing"), RECOVER_S)
            return self.meet("finish")
        return self.meet("train" if driver.committed else "start")

    def meet(self, phase: str) -> Fault:
        """One fault, and what comes of it."""
        kind = self.random.choice(self.kinds())
        driver = self.driver
        if not driver.until(lambda: driver.said["pids"], RECOVER_S):
            return Fault(
                "none", self.number, "start", 0, "lost", RECOVER_S, [f"did not start: {driver.said.get('error')}"[:600]]
            )
        fault = Fault(kind, self.number, phase, driver.committed)
        how, _, what = kind.partition(" ")
        began, restarts = time.monotonic(), driver.said.get("restarts", 0)
        getattr(self, f"_{how}")(fault, what)
        if fault.outcome == "lost":
            fault.problems.append(f"did not go on: {driver.said.get('error', 'no error is named')}"[:600])
        if phase != "finish" and how in ("kill", "stop") and what != "driver":
            driver.until(lambda: driver.said.get("restarts", 0) > restarts, NOTICED_S)  # updates before that are no recovery
        before = driver.committed
        ended = "ended" if phase == "finish" else "error"
        if not fault.outcome:
            done = (lambda: driver.said.get(ended)) if phase == "finish" else (lambda: driver.committed > before)
            if driver.until(done, RECOVER_S):
                fault.outcome = "recovered"
            else:
                fault.outcome = "lost"
                fault.problems.append(
                    f"no update within {RECOVER_S:g} s: {driver.said.get('error', 'no error is named')}"[:600]
                )
        fault.recovery_s = round(time.monotonic() - began, 2)
        return fault

    def _victim(self, name: str) -> int:
        pids = self.driver.said["pids"]
        return int(pids.get(name) or self.random.choice(list(pids.values())))

    def _signal(self, pid: int, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, number)

    def _kill(self, fault: Fault, what: str) -> None:
        if what == "driver":
            self.driver.end()
            self.driver.start(resume=self._resumable())
            fault.outcome = "" if self.driver.until(lambda: self.driver.said["pids"], RECOVER_S) else "lost"
        else:
            self._signal(self._victim(what), signal.SIGKILL)

    def _stop(self, fault: Fault, what: str) -> None:
        self._signal(self._victim(what), signal.SIGSTOP)

    def _pause(self, fault: Fault, what: str) -> None:
        pid = self._victim(what)
        self._signal(pid, signal.SIGSTOP)
        time.sleep(self.random.uniform(0.5, 12.0))  # the fault's own duration: a zombie may wake up after its successor began
        self._signal(pid, signal.SIGCONT)

    def _clock(self, fault: Fault, what: str) -> None:
        self.driver.set_clock(int(f"{what[0]}3600"))

    def _cut(self, fault: Fault, what: str) -> None:
        self.driver.in_net("ip", "link", "set", "lo", "down")
        time.sleep(self.random.uniform(0.5, 6.0))
        self.driver.in_net("ip", "link", "set", "lo", "up")

    def _slow(self, fault: Fault, what: str) -> None:
        slow = ["tbf", "rate", "1mbit", "burst", "64kb", "latency", "200ms"]
        self.driver.in_net("tc", "qdisc", "add", "dev", "lo", "root", *slow)
        time.sleep(self.random.uniform(2.0, 6.0))
        self.driver.in_net("tc", "qdisc", "del", "dev", "lo", "root")

    def _disk(self, fault: Fault, what: str) -> None:
        """Until there is an error that names it; then there is room again."""
        filler, driver = self.folder / "runs" / "filler", self.driver
        began = time.monotonic()
        with filler.open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(1 << 16))
        named = driver.until(lambda: driver.said.get("error") or "settled" in driver.said, RECOVER_S)
        seconds = time.monotonic() - began
        with suppress(subprocess.TimeoutExpired):
            driver.process.wait(30)
        if named and "settled" in driver.said:
            pass  # it needed no more room to end
        elif not named or "DiskFull" not in driver.said["error"]:
            fault.problems.append(f"a full disk was not named: {driver.said.get('error')}"[:600])
        elif seconds > NAMED_S:
            fault.problems.append(f"named after {seconds:.0f} s")
        driver.end()
        filler.unlink()
        driver.start(resume=self._resumable())
        fault.outcome = "" if driver.until(lambda: driver.said["pids"], RECOVER_S) else "lost"

    def _resumable(self) -> bool:
        return any((self.folder / "runs/run/checkpoints").glob("step_*"))

    def finish(self) -> list[str]:
        """What is wrong with the run's end, and with its log."""
        (self.folder / "enough").touch()
        driver = self.driver
        if not driver.until(lambda: "settled" in driver.said, RECOVER_S):
            return [f"did not end: {driver.said.get('error', 'no error')}"[:600]]
        with suppress(subprocess.TimeoutExpired):
            driver.process.wait(60)
        return check(self.folder / "runs/run", driver.said, self.settings["max_lag"])


def check(run: Path, said: dict[str, Any], max_lag: int) -> list[str]:
    import pyarrow as pa
    import pyarrow.compute as pc

    from asyncrl.replay import open as open_replay
    from asyncrl.replay.log import events as ev

    log = open_replay(run)
    lineage: list[Any] = []
    reserved, submitted = set[int](), set[tuple[int, int, int]]()
    for payload in log.events().column("payload").to_pylist():
        event = ev.decode(payload)
        if isinstance(event, ev.LearnerFenced):
            lineage = [commit for commit in lineage if commit.version.update <= event.committed]
        elif isinstance(event, ev.BatchCommitted):
            lineage.append(event)
        elif isinstance(event, ev.GroupReserved) and event.purpose == "train":
            reserved.add(event.group)
        elif isinstance(event, ev.RolloutSubmitted):
            submitted.add((event.group, event.rollout, event.attempt))
    keys = ["group", "rollout", "attempt"]
    stored = {tuple(row.values()) for piece in log.pieces("rows", keys, pa.Table.to_pylist) for row in piece}
    rows = log.rollouts(["span_updates", "trained_update"])
    problems = []
    if [commit.version.update for commit in lineage] != list(range(1, said["steps"] + 1)):
        problems.append("updates are missing or doubled")
    trained = Counter(group for commit in lineage for group in commit.groups)
    if max(trained.values(), default=1) > 1:
        problems.append(f"groups trained twice: {[group for group, count in trained.items() if count > 1][:5]}")
    if said["pending"] or len(reserved) != said["settled"] or len(trained) != said["trained"]:
        problems.append(f"{len(reserved)} reserved, {said['settled']} settled, {said['pending']} pending")
    if missing := submitted - stored:
        problems.append(f"{len(missing)} acknowledged rows are not in the log: {sorted(missing)[:3]}")
    of_trained = rows.filter(pc.is_valid(rows["trained_update"]))
    updates, spans = (of_trained[name].to_pylist() for name in ("trained_update", "span_updates"))
    worst = max((update - 1 - min(made) for update, made in zip(updates, spans, strict=True) if made), default=0)
    if worst > max_lag or said["lag"] > max_lag:
        problems.append(f"a token of lag {max(worst, said['lag'])} > {max_lag} was trained")
    return problems


# ------------------------------------------------------------------------------------------------- the campaign


@contextmanager
def small_disk(folder: Path, can: Can) -> Iterator[None]:
    """The runs' folder, on a disk of its own that can be filled."""
    (folder / "runs").mkdir()
    if not can.disk:
        yield
        return
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(folder / "runs")], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder / "runs")], check=True)


def make_inputs(folder: Path, can: Can, spread: float = 0.3) -> None:
    """spread: of the policy's weights; with less all tokens, the end too, are as likely: lengths have a long tail."""
    if can.clock:
        source = str(Path(__file__).with_name("clock_ahead.c"))
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", str(folder / "clock_ahead.so"), source, "-ldl"], check=True)
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes"))
    import arithmetic

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
    config = Qwen3Config(
        vocab_size=17, num_key_value_heads=2, tie_word_embeddings=True, initializer_range=spread, eos_token_id=1, **shape
    )
    Qwen3ForCausalLM(config).save_pretrained(folder / "model")
    arithmetic.make_tokenizer().save_pretrained(folder / "model")
    rows = [{"prompt": f"{i:02d}+{7 * i % 100:02d}=", "data_source": "sevens", "answer": "7"} for i in range(64)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "sevens.py").write_text(REWARD)


def one_run(seed: int, faults: int, inputs: Path, can: Can) -> list[Fault]:
    """A run that meets so many faults, the last of them perhaps while it finishes."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as made:
        folder = Path(made)
        shutil.copytree(inputs, folder, dirs_exist_ok=True)
        with small_disk(folder, can):
            campaign = Campaign(seed, folder, can)
            met: list[Fault] = []
            try:
                for i in range(faults):
                    met.append(campaign.next(first=i == 0, last=i == faults - 1))
                    if met[-1].outcome == "lost":
                        break
                problems = campaign.finish() if met[-1].outcome != "lost" else []
                met[-1].problems += problems
                if met[-1].problems:
                    shutil.copy(folder / "driver.log", Path(tempfile.gettempdir()) / f"faults-{seed}.log")
            finally:
                campaign.driver.end()
            met[-1].problems += [f"left behind: {name}" for name in left_behind(folder)]
    return met


def left_behind(folder: Path) -> list[str]:
    """Processes of a run that ended, or whose driver is dead, half a minute later; they are killed. Ray's own are not told of:
    once the clock was set back, idle workers don't see for an hour that their node is gone, and agents wait for it for ever."""

    def found() -> list[psutil.Process]:
        processes = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(MARK) == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                    processes.append(process)
        return processes

    deadline = time.monotonic() + NAMED_S
    while (left := found()) and time.monotonic() < deadline:
        time.sleep(0.5)
    names = []
    for process in left:
        with suppress(psutil.Error):
            names.append(" ".join(process.cmdline())[:80].strip())
            process.kill()
    return [name for name in names if name not in RAYS_OWN]


def print_table(faults: list[Fault]) -> None:
    print(f"\n{'fault':24}{'times':>6}{'recovered':>11}{'with problems':>15}{'recovery s: median':>20}{'largest':>9}")
    for kind in sorted({fault.kind for fault in faults}):
        of = [fault for fault in faults if fault.kind == kind]
        times = [fault.recovery_s for fault in of]
        fine = sum(fault.outcome == "recovered" for fault in of)
        wrong = sum(bool(fault.problems) for fault in of)
        print(f"{kind:24}{len(of):>6}{fine:>11}{wrong:>15}{statistics.median(times):>20.1f}{max(times):>9.1f}")
    phases = Counter(fault.phase for fault in faults)
    runs = len({fault.run for fault in faults})
    print(f"{len(faults)} faults in {runs} runs; {dict(phases)}; {sum(bool(f.problems) for f in faults)} with problems")


def main() -> None:
    if sys.argv[1:2] == ["--lead"]:
        lead(Path(sys.argv[2]), json.loads(sys.argv[3]), bool(int(sys.argv[4])))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=1000)
    parser.add_argument("--per-run", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the first run; the others follow")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no further run after so many")
    parser.add_argument("--out", type=Path, help="a line of JSON per fault")
    args = parser.parse_args()
    can, began = Can.find(), time.monotonic()
    print(f"left out: {[name for name, able in asdict(can).items() if not able] or 'nothing'}")
    met = [Fault(**json.loads(line)) for line in args.out.read_text().splitlines()] if args.out and args.out.exists() else []
    seed = max([args.seed - 1, *(fault.run for fault in met)]) + 1
    with tempfile.TemporaryDirectory() as made:
        make_inputs(Path(made), can)
        while len(met) < args.faults and time.monotonic() - began < 60 * args.minutes:
            found = one_run(seed, min(args.per_run, args.faults - len(met)), Path(made), can)
            met, seed = met + found, seed + 1
            for fault in found:
                print(json.dumps(asdict(fault)), flush=True)
            if args.out:
                with args.out.open("a") as file:
                    file.writelines(json.dumps(asdict(fault)) + "\n" for fault in found)
    print_table(met)


if __name__ == "__main__":
    main()
