"""`asyncrl export`: a checkpoint's policy as a Hugging Face folder, with its tokenizer and chat template."""

import argparse
import sys
from pathlib import Path

from asyncrl.errors import ConfigError
from asyncrl.learn.policies import locate
from asyncrl.rundir import atomic_folder


def export_job(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `asyncrl export`, and sets what runs."""
    parser.add_argument("source", metavar="RUN_OR_CHECKPOINT", help="runs/NAME (its newest checkpoint) or …/checkpoints/step_N")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write")
    parser.add_argument("--tokenizer", default="", help="Hugging Face folder or id (default: the run's)")
    parser.add_argument(
        "--dtype", default="", choices=["", "float32", "bfloat16"], help="of the weights (default: the checkpoint's)"
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it holds something")
    parser.set_defaults(job=_export)


def _export(args: argparse.Namespace) -> int:
    """Prints the folder. It is whole or absent: written beside and renamed."""
    out: Path = args.out.expanduser().absolute()
    require_free(out, args.force)
    policy = locate(args.source, args.tokenizer, args.dtype)

    from asyncrl.learn.policies import load
    from asyncrl.models.loading import export

    model, tokenizer = load(policy)
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(out) as beside:
        export(model, tokenizer, beside)
    print(f"exported {policy.checkpoint or policy.spec.path}", file=sys.stderr)
    print(out)
    return 0


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
