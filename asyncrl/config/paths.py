"""Where the files that a recipe names are. Pure apart from asking which of two candidate paths exists.

A recipe is data, so it names files by text: `{run}` is the run directory; a relative file is looked for in the recipe's
own folder first and then in the working directory. After `resolve_paths` every local path is absolute, so that actors in
other working directories (and on other nodes) read the same file.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from asyncrl.config.callables import is_file
from asyncrl.config.recipe import Recipe
from asyncrl.errors import ConfigError
from asyncrl.rundir import RunDir

PLACEHOLDER = "{run}"


def resolve_paths(recipe: Recipe, run_dir: RunDir, folder: str | Path | None = None) -> Recipe:
    """The same recipe with `{run}` replaced everywhere and local files made absolute. Idempotent.

    folder: the recipe file's; None for a recipe built in Python (the working directory alone). Files that exist in
    neither place are taken to belong to the first whose folder exists, where the error about them will point. `path` and
    `tokenizer` of a model stay Hugging Face ids unless such a folder exists or they look like a path (`./x`, `/x`, `~/x`,
    `a/b/c`).
    """
    folders = tuple(dict.fromkeys(Path(base).resolve() for base in (folder, Path.cwd()) if base is not None))
    run = json.dumps(str(run_dir.path.resolve()))[1:-1]  # as it stands within a string
    data = json.loads(json.dumps(msgspec.to_builtins(recipe)).replace(PLACEHOLDER, run))
    _require_finite("", data)
    for section in ("data", "evaluation"):
        data[section]["files"] = [_file(name, folders) for name in data[section]["files"]]
    terms = data["reward"]["functions"]
    judges = [term["judge"] for term in terms if term["judge"]]
    for judge in judges:
        judge["prompt"] = _file(judge["prompt"], folders)
    for model in filter(None, (data["model"], data["critic"]["model"], *(of["model"] for of in (*terms, *judges)))):
        for key in ("path", "tokenizer"):
            model[key] = _model(model[key], folders)
    return rename_functions(msgspec.convert(data, Recipe), lambda name: _callable(name, folders))


def _require_finite(where: str, value: Any) -> None:
    """Raises ConfigError for an infinite number, which the run's recipe.json could not hold."""
    if isinstance(value, dict):
        for key, one in value.items():
            _require_finite(f"{where}.{key}" if where else key, one)
    elif isinstance(value, list):
        for one in value:
            _require_finite(where, one)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where} holds {value}: only finite numbers can be saved with a run; use a large one, as 1e9")


def rename_functions(recipe: Recipe, rename: Callable[[str], str]) -> Recipe:
    """The same recipe with what `rename` makes of the name of each function, built-in ones included."""
    data = msgspec.to_builtins(recipe)
    for reward in (data["reward"], *data["reward"]["functions"]):
        reward["function"] = rename(reward["function"])
        if judge := reward.get("judge"):
            judge["parse"] = rename(judge["parse"])
    for model in filter(None, (data["model"], data["critic"]["model"])):
        model["builder"] = rename(model["builder"])
    data["evaluation"]["metrics"] = [rename(metric) for metric in data["evaluation"]["metrics"]]
    data["sampling"]["keep"] = rename(data["sampling"]["keep"])
    for key in ("environment", "agent"):
        data["episode"][key] = rename(data["episode"][key])
    data["episode"]["tools"] = [rename(tool) for tool in data["episode"]["tools"]]
    for key in ("adv_estimator", "policy_loss"):
        data["algorithm"][key] = rename(data["algorithm"][key])
    data["prepare"] = rename(data["prepare"])
    return msgspec.convert(data, Recipe)


def _file(name: str, folders: tuple[Path, ...]) -> str:
    candidates = [folder / Path(name).expanduser() for folder in folders]
    there = [path for path in candidates if path.exists()] or [path for path in candidates if path.parent.is_dir()]
    return str((there or candidates)[0])


def _model(name: str, folders: tuple[Path, ...]) -> str:
    pathlike = name.startswith((".", "/", "~")) or name.count("/") > 1
    if pathlike or (name and any((folder / name).is_dir() for folder in folders)):
        return _file(name, folders)
    return name


def _callable(name: str, folders: tuple[Path, ...]) -> str:
    file, colon, attribute = name.rpartition(":")
    return f"{_file(file, folders)}:{attribute}" if colon and is_file(file) else name
