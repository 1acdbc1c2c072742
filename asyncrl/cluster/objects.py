"""What a program has as objects (model, tokenizer, data, rewards), as a recipe and files that actors and a resume find.

Each object lies in a folder that is named by its content: given again it is not kept twice, and given otherwise it leaves
what an earlier run was started from.
"""

import hashlib
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from asyncrl.config import EvaluationSpec, ModelSpec, Recipe, RewardSpec, RewardTerm
from asyncrl.config.callables import load_callable, reference_to
from asyncrl.config.explain import explain, nearest
from asyncrl.config.names import elsewhere
from asyncrl.errors import ConfigError
from asyncrl.prompts.tables import write_table
from asyncrl.reward.functions import is_trl
from asyncrl.rundir import atomic_folder, sha256

_DTYPES = ("float32", "bfloat16")


def recipe_of(
    folder: Path, model: Any, tokenizer: Any, dataset: Any, reward: Any, eval_dataset: Any, settings: Mapping[str, Any]
) -> Recipe:
    """The recipe of a run from objects, which are written into `folder`. settings: other fields of `Recipe`, as specs or
    mappings; `data` without its files. Raises ConfigError or DataError for what is of no known kind."""
    for name in settings:
        if name not in Recipe.__struct_fields__:
            raise ConfigError(f"from_objects has no setting {name!r}{elsewhere(name) or nearest(name, Recipe)}")
    rewards = _reward(reward)
    data: dict[str, Any] = dict(settings.get("data") or {})
    files, columns = _data(folder, "train", dataset)
    if columns and "data_source" not in columns:
        data.setdefault("source_key", "")
    if columns and "reward_model" not in columns and all(_of_trl(term) for term in rewards.terms()):
        data.setdefault("answer_key", "")  # such functions are given every column by its name
    held_out = settings.get("evaluation", EvaluationSpec())
    if eval_dataset is not None:
        held_out = {**_plain(held_out), "files": _data(folder, "eval", eval_dataset)[0]}
    given = {
        **settings,
        "model": _model(folder, model, tokenizer),
        "data": {**data, "files": files},
        "reward": rewards,
        "evaluation": held_out,
    }
    fields = _plain({"name": "run", **given})
    try:
        return msgspec.convert(fields, Recipe)
    except msgspec.ValidationError as error:
        raise ConfigError(f"from_objects: {explain(error, Recipe, fields)[1]}") from error


def _plain(value: Any) -> Any:
    def hook(found: Any) -> Any:
        if callable(found):
            return reference_to(found)
        if isinstance(found, Path):
            return str(found)
        raise ConfigError(f"from_objects: {found!r:.80} is a {type(found).__name__}, which no field of a recipe can hold")

    return msgspec.to_builtins(value, enc_hook=hook)


def _kept(folder: Path, kind: str, write: Callable[[Path], Any]) -> Path:
    """The folder that holds what `write` writes into the one that it is given."""
    made = folder / kind
    with atomic_folder(made) as beside:
        write(beside)
    digest = hashlib.sha256()
    for file in sorted(path for path in made.rglob("*") if path.is_file()):
        digest.update(f"{file.relative_to(made)}\0{sha256(file)}\0".encode())
    final = folder / f"{kind}-{digest.hexdigest()[:16]}"
    if final.is_dir():
        shutil.rmtree(made)
    else:
        made.rename(final)
    return final


def _model(folder: Path, model: Any, tokenizer: Any) -> ModelSpec:
    spec = model if isinstance(model, ModelSpec) else None
    if isinstance(model, str | Path):
        spec = ModelSpec(path=str(model))
    if isinstance(tokenizer, str | Path):
        named = str(tokenizer)
    elif tokenizer is None and spec is not None:
        named = spec.tokenizer
    elif hasattr(tokenizer, "save_pretrained") and hasattr(tokenizer, "encode"):
        named = str(_kept(folder, "tokenizer", tokenizer.save_pretrained))
    else:
        raise ConfigError(
            f"from_objects: the tokenizer is a {type(tokenizer).__name__}; give a transformers tokenizer, a Hugging Face id or "
            "a folder; None only for a model that is named, whose own it is then"
        )
    if spec is None:
        _require_model(model)
        spec = ModelSpec(path=str(_kept(folder, "model", model.save_pretrained)), dtype=str(model.dtype).removeprefix("torch."))  # type: ignore[arg-type]
    return replace(spec, tokenizer=named)


def _require_model(model: Any) -> None:
    """Raises ConfigError for what is no model of transformers, or none that comes back from a folder as it is."""
    kind = type(model).__name__
    if not any(base.__name__ == "PreTrainedModel" for base in type(model).__mro__):
        problem = "is no model of transformers, nor a name; give a PreTrainedModel, a Hugging Face id, a folder or a ModelSpec"
    elif getattr(model, "_hf_peft_config_loaded", False) or getattr(model, "is_quantized", False):
        problem = "has adapters or quantized weights: give the plain model, for adapters with learner=LearnerSpec(lora=…)"
    elif (dtype := str(model.dtype).removeprefix("torch.")) not in _DTYPES:
        problem = f"is in {dtype}, in which nothing is trained; give it as model.float(), or in bfloat16"
    else:
        return
    raise ConfigError(f"from_objects: the model (a {kind}) {problem}")


def _data(folder: Path, kind: str, dataset: Any) -> tuple[tuple[str, ...], list[str]]:
    """The files of a data set, and the columns of one that was given itself."""
    paths = dataset if isinstance(dataset, list | tuple) else [dataset]
    if paths and all(isinstance(path, str | Path) for path in paths):
        return tuple(map(str, paths)), []
    columns: list[str] = []
    what = "from_objects: the dataset" if kind == "train" else "from_objects: the eval_dataset"
    made = _kept(folder, kind, lambda beside: columns.extend(write_table(dataset, beside / f"{kind}.parquet", what)))
    return (str(made / f"{kind}.parquet"),), columns


def _reward(reward: Any) -> RewardSpec:
    if isinstance(reward, RewardSpec):
        return reward
    if isinstance(reward, list | tuple) and reward:
        return RewardSpec(functions=tuple(map(_term, reward)))
    if isinstance(reward, RewardTerm):
        return RewardSpec(functions=(reward,))
    return RewardSpec(function=_term(reward).function)


def _term(reward: Any) -> RewardTerm:
    if isinstance(reward, RewardTerm):
        return reward
    if hasattr(reward, "save_pretrained") or not (callable(reward) or isinstance(reward, str)):
        raise ConfigError(
            f"from_objects: the reward is a {type(reward).__name__}; give a function (verl's compute_score or TRL's "
            "f(prompts, completions, **columns)), its name, a RewardTerm, a list of these, or a RewardSpec"
        )
    return RewardTerm(function=reward)


def _of_trl(term: RewardTerm) -> bool:
    if not term.function:  # it needs no ground truth
        return True
    return term.style == "trl" or (term.style == "auto" and is_trl(load_callable(term.function, "reward")))
