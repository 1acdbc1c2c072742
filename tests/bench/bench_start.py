"""From `asyncrl run recipes/arithmetic.py` to its first trained step: `python tests/bench/bench_start.py [--runs 3]`.

Prints when what was there, in seconds since the command was started, and the CPU time that each process had used when the first
step was trained: on a machine whose cores are shared that, divided by the cores, is the time that it would take alone.
The first start prepares the data and the policy, and is not counted; `--runs-dir` keeps what it made for the next time.
"""

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "arithmetic.py"
ROLES = {  # what a process's command line has, by what it is called below; the first that fits
    "ray's agents": re.compile(r"^ray::\w*Agent|ray/(dashboard|_private)"),
    "scoring process": re.compile(r"asyncrl\.reward\.process"),
    "forkserver and stand-ins": re.compile(r"asyncrl[./]cluster[./]forkserver"),
    "driver": re.compile(r"asyncrl\.cli"),
    "idle worker": re.compile(r"ray::IDLE|default_worker\.py"),
    "gcs_server": re.compile(r"gcs_server"),
    "raylet": re.compile(r"raylet/raylet"),
}


def role(process: psutil.Process) -> str:
    line = " ".join(process.cmdline())
    return next((name for name, form in ROLES.items() if form.search(line)), "others")


def cpu_s(driver: psutil.Process, names: dict[int, str]) -> dict[str, float]:
    """CPU seconds so far of the driver and all below it, by what they are; names: of actors by pid."""
    spent: dict[str, float] = {}
    for process in [driver, *driver.children(recursive=True)]:
        try:
            times = process.cpu_times()
            name = names.get(process.pid) or role(process)
        except psutil.Error:
            continue
        spent[name] = spent.get(name, 0.0) + times.user + times.system
        if process == driver:
            spent["what the driver ran aside"] = times.children_user + times.children_system
    return spent


def start(runs_dir: Path) -> tuple[dict[str, float], dict[str, float]]:
    """(seconds until each mark, CPU seconds by process) of one start, which is ended after its first step."""
    metrics = runs_dir / "arithmetic" / "metrics.jsonl"
    metrics.unlink(missing_ok=True)  # of an earlier start, which would be moved aside
    began = time.time()
    marks: dict[str, float] = {}
    names: dict[int, str] = {}
    command = [sys.executable, "-m", "asyncrl.cli", "run", str(RECIPE), "--runs-dir", str(runs_dir), "total_steps=3"]
    environ = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environ) as driver:

        def listen() -> None:
            assert driver.stderr is not None
            for line in driver.stderr:
                marks.setdefault(re.sub(r"^\S+ \w+ \S+: | \(pid \d+\)", "", line.strip())[:60], time.time() - began)
                if found := re.search(r": (\S+) is up \(pid (\d+)\)", line):
                    names[int(found[2])] = found[1]

        threading.Thread(target=listen, daemon=True).start()
        spent: dict[str, float] = {}
        while driver.poll() is None:
            lines = metrics.read_text().splitlines() if metrics.exists() else []
            first = next((line for text in lines if (line := json.loads(text))["kind"] == "step"), None)
            if first is not None:
                marks["the first step is trained"] = first["time"] - began
                spent = cpu_s(psutil.Process(driver.pid), names)
                for pid, name in names.items():
                    with contextlib.suppress(psutil.Error):
                        marks[f"the process of {name} is started"] = psutil.Process(pid).create_time() - began
                break
            time.sleep(0.02)
        driver.wait()
    return marks, spent


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--runs-dir", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.runs_dir or Path(scratch)
        if not (folder / "arithmetic" / "data" / "warm" / "made.json").exists():
            start(folder)
        runs = [start(folder) for _ in range(args.runs)]
    for title, index in (("seconds until", 0), ("CPU seconds of", 1)):
        print(title)
        medians = {name: statistics.median(run[index].get(name, 0.0) for run in runs) for name in runs[0][index]}
        for name in sorted(medians, key=medians.__getitem__):
            print(f"  {medians[name]:8.2f}  {name}")
    total = statistics.median(sum(run[1].values()) for run in runs)
    print(f"  {total:8.2f}  in all: {total / (os.cpu_count() or 1):.2f} s on all cores")


if __name__ == "__main__":
    main()
