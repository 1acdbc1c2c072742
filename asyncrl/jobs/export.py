"""`asyncrl export` and `merge`, one command: a checkpoint of asyncrl, or verl's FSDP shards, as a Hugging Face folder."""

import argparse
import math
import re
import sys
from pathlib import Path

from asyncrl.errors import ConfigError
from asyncrl.learn.policies import Policy, locate
from asyncrl.manifests import MANIFEST
from asyncrl.rundir import atomic_folder


def export_job(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `asyncrl export`, and sets what runs."""
    parser.add_argument(
        "source",
        metavar="SRC",
        help="runs/NAME (its newest checkpoint), …/checkpoints/step_N, or verl's …/global_step_N with FSDP shards",
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write")
    parser.add_argument("--tokenizer", default="", help="Hugging Face folder or id (default: the run's)")
    parser.add_argument(
        "--dtype", default="", choices=["", "float32", "bfloat16"], help="of the weights (default: the checkpoint's)"
    )
    parser.add_argument("--shard-gb", type=float, default=5.0, help="size of one file of weights, at most (default: 5)")
    parser.add_argument(
        "--adapter", action="store_true", help="the LoRA adapter alone, as a folder of peft's (default: merged)"
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it holds something")
    parser.set_defaults(job=_export)


def _export(args: argparse.Namespace) -> int:
    """Prints the folder. It is whole or absent: written beside, loaded back, compared, and renamed.

    Memory: the model once, and a tensor or two; it is dropped before it is loaded back.
    """
    out: Path = args.out.expanduser().absolute()
    if not 0 < args.shard_gb < math.inf:
        raise ConfigError(f"--shard-gb {args.shard_gb}: no file could hold a tensor; give a size above 0")
    require_free(out, args.force)
    policy = locate(args.source, args.tokenizer, args.dtype)
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(out) as beside:
        (_write_adapter if args.adapter else _write_model)(args, policy, beside)
    print(f"exported {policy.checkpoint or policy.spec.path}", file=sys.stderr)
    if left := _left(policy):
        print(f"left out, being no part of the policy: {', '.join(left)}", file=sys.stderr)
    print(out)
    return 0


def _write_model(args: argparse.Namespace, policy: Policy, folder: Path) -> None:
    from asyncrl.learn.policies import load
    from asyncrl.models.loading import export, fingerprints, verify_export

    model, tokenizer = load(policy)
    expected = fingerprints(model)
    export(model, tokenizer, folder, int(args.shard_gb * 1e9) or 1)
    del model
    verify_export(folder, expected, policy.spec.trust_remote_code)


def _write_adapter(args: argparse.Namespace, policy: Policy, folder: Path) -> None:
    from asyncrl.models.lora import export_adapters, load_adapted, stored_adapters
    from asyncrl.models.tokenizing import load_tokenizer

    adapters = stored_adapters(policy.checkpoint / "policy") if policy.checkpoint is not None else None
    if policy.checkpoint is None or adapters is None:
        raise ConfigError(f"--adapter: {args.source} has no adapter, for it was not trained with learner.lora; leave it out")
    if args.dtype:
        raise ConfigError(f"--dtype {args.dtype} with --adapter: adapters stay in float32, it would be ignored; leave it out")
    export_adapters(load_adapted(policy.checkpoint / "policy"), adapters.base, folder)
    load_tokenizer(policy.spec).save_pretrained(folder)


def _left(policy: Policy) -> list[str]:
    """What else is in the checkpoint: critic, optimizer, random state; files that each rank has are named once."""
    folder = policy.checkpoint
    if folder is None:
        return []
    used = {"policy", MANIFEST, "huggingface", "fsdp_config.json", *(file.name for file in policy.shards)}
    found = {re.sub(r"_rank_\d+", "_rank_*", entry.name) for entry in folder.iterdir() if entry.name not in used}
    if policy.shards and folder.name == "actor":
        found |= {f"../{entry.name}" for entry in folder.parent.iterdir() if entry != folder}
    return sorted(found)


def require_free(out: Path, force: bool) -> None:
    """Raises ConfigError unless `out` is absent, empty, or, with `force`, a Hugging Face folder; an empty one is removed."""
    if out.is_file():
        raise ConfigError(f"{out} is a file: a Hugging Face model is a folder; choose another name")
    if not out.is_dir():
        return
    if not any(out.iterdir()):
        out.rmdir()
        return
    # Replacing is only ever meant for an earlier export: a slip must not cost a home directory.
    if not force:
        raise ConfigError(f"{out} is not empty, and would be replaced; choose another folder, or add --force")
    if not (out / "config.json").is_file():
        raise ConfigError(
            f"{out} is not empty and no Hugging Face folder (no config.json): it won't be replaced; choose another folder"
        )
