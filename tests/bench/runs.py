"""Whole runs of recipes for the tables in this folder: each is `asyncrl run`, once; a finished one is not run again.

`--runs-dir` keeps them: a table that was interrupted goes on, and can be printed again. Runs of one seed share what
`prepare` made.
"""

import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from asyncrl.api import RunResult

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
RESULT = "result.json"


class Settings(NamedTuple):
    """One row of a table: a recipe with overrides, to be run with several seeds."""

    label: str
    recipe: Path
    overrides: tuple[str, ...] = ()

    def name(self, seed: int) -> str:
        return f"{self.recipe.stem}-{''.join(c if c.isalnum() else '_' for c in self.label)}-{seed}"


class Finished(NamedTuple):
    result: RunResult
    steps: list[dict[str, float]]  # metrics.jsonl, one line per update
    evals: list[dict[str, float]]

    def mean(self, metric: str) -> float:
        """Over all updates that have it."""
        return statistics.fmean(step[metric] for step in self.steps if metric in step)


def run(settings: Settings, seed: int, runs_dir: Path) -> Finished:
    """Runs it, unless that was done with the same overrides. Raises CalledProcessError if it fails; its output is above."""
    folder = runs_dir / settings.name(seed)
    command = [str(settings.recipe), f"seed={seed}", *settings.overrides]
    kept = json.loads((folder / RESULT).read_text()) if (folder / RESULT).exists() else {}
    if kept.get("command") != command:
        _share_data(settings.recipe.stem, seed, folder)
        arguments = ["run", *command, "--runs-dir", str(runs_dir), "--name", folder.name]
        print(f"asyncrl {' '.join(arguments)}", file=sys.stderr)
        done = subprocess.run([sys.executable, "-m", "asyncrl.cli", *arguments], stdout=subprocess.PIPE, text=True, check=True)
        kept = {"command": command, "result": json.loads(done.stdout.splitlines()[-1])}
        (folder / RESULT).write_text(json.dumps(kept))
        _keep_data(settings.recipe.stem, seed, folder)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return Finished(
        result=msgspec.convert(kept["result"], RunResult),
        steps=[line for line in lines if line["kind"] == "step"],
        evals=[line for line in lines if line["kind"] == "eval"],
    )


def _share_data(recipe: str, seed: int, folder: Path) -> None:
    shared = folder.parent / f"data-{recipe}-{seed}"
    if shared.is_dir() and not (folder / "data").exists():
        shutil.copytree(shared, folder / "data")


def _keep_data(recipe: str, seed: int, folder: Path) -> None:
    shared = folder.parent / f"data-{recipe}-{seed}"
    if not shared.exists():
        shutil.copytree(folder / "data", shared)


def spread(values: Iterable[float], digits: int = 3) -> str:
    """Mean and, in brackets, the smallest and the largest; of a single value, that."""
    found = list(values)
    mean, *ends = (f"{value:.{digits}f}" for value in (statistics.fmean(found), min(found), max(found)))
    return f"{mean} [{', '.join(ends)}]" if len(found) > 1 else mean


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown, columns aligned."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )
