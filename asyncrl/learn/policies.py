"""What a person may name as a model: a Hugging Face id or folder, a checkpoint of asyncrl or verl, or a run (its newest)."""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Struct

from asyncrl.config import ModelSpec, Recipe
from asyncrl.errors import CheckpointError, ConfigError
from asyncrl.manifests import MANIFEST, verify_manifest
from asyncrl.models.hub import require_model
from asyncrl.models.shards import ShardedWeights, shard_files, shards_folder
from asyncrl.models.stored import StoredTensors
from asyncrl.rundir import RunDir
from asyncrl.types import Version

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from asyncrl.models.ranks import Ranks

log = logging.getLogger(__name__)
Refusal = Callable[[Version], str]


class Policy(Struct, frozen=True, kw_only=True):
    """Where the weights, configuration and tokenizer are."""

    spec: ModelSpec
    checkpoint: Path | None = None  # None for a Hugging Face model
    shards: tuple[Path, ...] = ()  # of a checkpoint of verl's: a file per rank. `spec.dtype` may be "" then: as they hold it
    recipe: Recipe | None = None  # of the run that the checkpoint lies in, if it still does


def locate(name: str, tokenizer: str = "", dtype: str = "") -> Policy:
    """Finds out what `name` is, and verifies a checkpoint's checksums. No torch.

    Of verl's shards only the listing is checked: `load` reads them once, whatever is done with them.
    tokenizer, dtype: override what the run or the checkpoint says (float32 for a Hugging Face model).
    Raises ConfigError: an empty run, a checkpoint without a tokenizer; CheckpointError: none is whole.
    """
    path = Path(name).expanduser()
    if path.name.startswith("step_") and not path.is_dir():
        found = ", ".join(sorted(other.name for other in path.parent.glob("step_*"))) or "none"
        raise ConfigError(f"no checkpoint {path}; beside it are: {found}")
    if path.name.startswith("step_") or (path / MANIFEST).is_file():
        return _checkpoint(path, verify_manifest(path), tokenizer, dtype)
    if (folder := shards_folder(path)) is not None:
        verl = ModelSpec(path=str(folder / "huggingface"), tokenizer=tokenizer, dtype=dtype)  # type: ignore[arg-type]
        return Policy(spec=verl, checkpoint=folder, shards=tuple(shard_files(folder)))
    if (path / "checkpoints").is_dir() or (path / "recipe.json").is_file():
        if not RunDir(path).steps():
            raise ConfigError(
                f"run {path} has no checkpoint yet: there is nothing to load; wait for its first, or name a model"
            )
        return _checkpoint(*newest_complete(RunDir(path)), tokenizer, dtype)
    if not path.exists():
        require_model(name, "model")
    if path.is_dir() and not (path / "config.json").is_file():
        raise ConfigError(
            f"{path} is no model, checkpoint or run: it has neither config.json, {MANIFEST}, checkpoints/ nor verl's "
            "model_world_size_W_rank_R.pt; name a Hugging Face folder or id, runs/NAME, or runs/NAME/checkpoints/step_N"
        )
    spec = ModelSpec(path=str(path) if path.is_dir() else name, tokenizer=tokenizer, dtype=dtype or "float32")  # type: ignore[arg-type]
    return Policy(spec=spec)


def load(policy: Policy, ranks: "Ranks | None" = None) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """The model in eval mode, adapters merged, and its tokenizer. ranks: as in models.loading.made_by_first.

    Raises ConfigError or CheckpointError naming what could not be loaded.
    """
    from asyncrl.models.loading import made_by_first
    from asyncrl.models.tokenizing import load_tokenizer

    tokenizer = load_tokenizer(policy.spec)
    return made_by_first(ranks, policy.spec, partial(_model, policy)), tokenizer


def _model(policy: Policy) -> "PreTrainedModel":
    import torch

    from asyncrl.models.loading import adopt_weights, empty_model, load_model, named_weights
    from asyncrl.models.lora import load_adapted, merge_adapters, stored_adapters

    if policy.checkpoint is None:
        return load_model(policy.spec)
    path, dtype = policy.checkpoint / "policy", policy.spec.dtype
    weights: Mapping[str, torch.Tensor]
    if stored_adapters(path) is not None:
        merged = load_adapted(path)
        merge_adapters(merged)
        if merged.dtype == getattr(torch, dtype):
            return merged
        weights = named_weights(merged)
    else:
        weights = ShardedWeights(policy.shards) if policy.shards else StoredTensors(path)
    # A checkpoint holds the names of the model in memory, which from_pretrained would try to convert, or leave out.
    model = empty_model(policy.spec)
    adopt_weights(model, weights, getattr(torch, dtype) if dtype else None)
    return model


def newest_complete(
    run_dir: RunDir, at: int | None = None, refusal: Refusal = lambda version: "", sums: bool = True
) -> tuple[Path, dict[str, Any]]:
    """The last of a run's checkpoints that is whole and not refused, and its manifest; warns of those skipped.

    at: only the one after so many updates will do. refusal: why a checkpoint of this version can't be used; empty if it can.
    sums: whether checksums are compared. Raises ConfigError if there is none, CheckpointError if none can be used.
    """
    run_dir.require_checkpoint(at)
    folders, problems = run_dir.steps(), []
    for folder in reversed(folders) if at is None else [run_dir.checkpoint(at)]:
        try:
            extra = verify_manifest(folder, sums)
            if problem := refusal(Version(extra["incarnation"], extra["update"])):
                raise CheckpointError(f"{folder} can't be resumed from: {problem}")
            return folder, extra
        except CheckpointError as error:
            log.warning("skipping %s: %s", folder, error)
            problems.append(str(error))
    others = "" if at is None else f"\nthe run has {', '.join(folder.name for folder in folders)}"
    raise CheckpointError(f"no checkpoint of {run_dir.path} can be used:\n  " + "\n  ".join(problems) + others)


def require_resumable(folder: Path, *kinds: str) -> None:
    """Raises CheckpointError for a checkpoint that training can't go on from, as far as its files' headers tell. No torch.

    kinds: of what it must hold besides the policy: "critic".
    """
    if not (folder / "training_state.json").is_file():
        raise CheckpointError(
            f"{folder} was written by an earlier version of asyncrl, whose optimizer can't be gone on with; `asyncrl export` "
            "it, and start a new run from that folder (model.path)"
        )
    for kind in ("policy", *kinds):
        if not (folder / kind).is_dir():
            raise CheckpointError(
                f"{folder} holds no {kind}, but the recipe has one: untrained values would mislead a trained policy; resume "
                "with the run's own algorithm.adv_estimator, or export the policy and start a new run from it"
            )
        StoredTensors(folder / kind)
        StoredTensors(folder / "optimizer" / kind)


def _checkpoint(folder: Path, manifest: dict[str, Any], tokenizer: str, dtype: str) -> Policy:
    recipe = run_recipe(folder.absolute().parent.parent / "recipe.json")
    if not tokenizer and recipe is None:
        raise ConfigError(
            f"checkpoint {folder} lies in no run directory, so its recipe, which names the tokenizer, is unknown; "
            "add --tokenizer FOLDER_OR_ID"
        )
    of_run = recipe.model if recipe else ModelSpec(path="")
    spec = ModelSpec(
        # A builder makes the model as it made the run's: it reads again what it read then.
        path=of_run.path if of_run.builder else str(folder / "policy"),
        revision=of_run.revision if of_run.builder else "",
        tokenizer=tokenizer or of_run.tokenizer or of_run.path,
        tokenizer_revision="" if tokenizer else of_run.tokenizer_revision if of_run.tokenizer else of_run.revision,
        dtype=dtype or manifest["model"]["dtype"],  # type: ignore[arg-type]
        trust_remote_code=of_run.trust_remote_code,
        builder=of_run.builder,
    )
    return Policy(spec=spec, checkpoint=folder, recipe=recipe)


def run_recipe(path: Path) -> Recipe | None:
    """The recipe.json of a run; None if it is not there. Raises ConfigError for one of another version of asyncrl."""
    if not path.is_file():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=Recipe)
    except msgspec.MsgspecError as error:
        raise ConfigError(f"{path} is no recipe of this version of asyncrl: {error}") from error
