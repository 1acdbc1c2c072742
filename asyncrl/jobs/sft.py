"""`asyncrl sft`: SFT warm start of a model on demonstrations. Its result is a Hugging Face folder, whole or absent.

OUT/        the policy and its tokenizer, for `model.path` of a recipe
OUT.sft/    sft.json  metrics.jsonl  tensorboard/  checkpoints/ (until OUT is there)
"""

import argparse
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from msgspec import Struct

from asyncrl.config import DemonstrationsSpec, ModelSpec, SFTSpec
from asyncrl.config.load import override
from asyncrl.errors import ConfigError
from asyncrl.jobs.export import require_free
from asyncrl.jobs.local_ranks import device_of, join_at, ranks_of, together
from asyncrl.learn.policies import Policy, load, locate
from asyncrl.processes import end_with_owner
from asyncrl.prompts.demonstrations import check_demonstrations, read_demonstrations
from asyncrl.report.progress import WarmStartLines
from asyncrl.rundir import RunDir, StandardError, set_up_logging, write_atomic

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from asyncrl.learn.sft_run import Observe
    from asyncrl.models.packed import TokenSequence
    from asyncrl.models.ranks import Ranks

log = logging.getLogger(__name__)


class SFTResult(Struct, frozen=True, kw_only=True):
    """What a warm start came to; `asyncrl sft` prints it as its one line of JSON."""

    out: str  # the Hugging Face folder
    steps: int
    examples: int  # trained on
    too_long: int  # examples left out
    loss: float  # of the last batch
    first_heldout_loss: float | None  # None without held-out files
    last_heldout_loss: float | None


def sft_job(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `asyncrl sft`, and sets what runs."""
    parser.add_argument(
        "model", metavar="MODEL_OR_CHECKPOINT", help="Hugging Face id or folder, runs/NAME, or …/checkpoints/step_N"
    )
    parser.add_argument("out", metavar="OUT", help="folder to write; OUT.sft beside it gets metrics and checkpoints")
    parser.add_argument("--data", action="append", required=True, metavar="F", help="parquet or JSONL file; repeatable")
    parser.add_argument("--heldout", action="append", default=[], metavar="F", help="files whose loss is reported; repeatable")
    parser.add_argument("--resume", action="store_true", help="go on from the newest complete checkpoint in OUT.sft")
    parser.add_argument("--force", action="store_true", help="replace OUT, and what an unfinished warm start left")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="a.b=c", help="fields of asyncrl.config.sft.SFTSpec, e.g. lr=1e-5 epochs=2"
    )
    parser.set_defaults(job=_sft)


def _sft(args: argparse.Namespace) -> int:
    """Standard output gets one line of JSON at the end; everything else goes to standard error."""
    data = DemonstrationsSpec(files=tuple(args.data), heldout=tuple(args.heldout))
    spec = override(SFTSpec(model=ModelSpec(path=args.model), data=data, out=args.out), args.overrides)
    for number in (signal.SIGTERM, signal.SIGHUP):  # a job that is stopped ends like one that is interrupted
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(number, signal.default_int_handler)
    began = time.monotonic()
    result = train(spec, resume=args.resume, force=args.force, observe=WarmStartLines())
    print(msgspec.json.encode(result).decode(), flush=True)
    print(f"{result.steps} steps in {time.monotonic() - began:.1f} s", file=sys.stderr)
    return 0


def train(spec: SFTSpec, *, resume: bool = False, force: bool = False, observe: "Observe | None" = None) -> SFTResult:
    """Makes the folder `spec.out`. On the same number of threads, the same spec and files give the same bytes.

    resume: go on from the newest checkpoint, to the bit. force: replace an earlier result, or start an unfinished one over.
    Raises ConfigError or DataError before torch is loaded where that can be known; NonFinite if training breaks down.
    """
    out = Path(spec.out).expanduser().absolute()
    require_free(out, force)
    policy = _start(spec)
    check_demonstrations((*spec.data.files, *spec.data.heldout), spec.data)
    work = RunDir(out.with_name(f"{out.name}.sft"))
    if resume:
        work.require_checkpoint()
    with work.lock(work.checkpoints):
        _begin(work, spec, resume, force)
        try:
            with together(ranks_of(spec), work, __name__) as ranks:
                result = _train(spec, policy, work, ranks, observe)
        except KeyboardInterrupt:
            steps = work.steps()
            log.warning("interrupted: %s", f"--resume goes on from {steps[-1].name}" if steps else "there is no checkpoint yet")
            raise
        shutil.rmtree(work.checkpoints, ignore_errors=True)
    return result


def _start(spec: SFTSpec) -> Policy:
    """The policy that is trained, with what the spec says of it."""
    policy = locate(spec.model.path, spec.model.tokenizer, spec.model.dtype)
    given, found = spec.model, policy.spec
    model = msgspec.structs.replace(
        found,
        trust_remote_code=found.trust_remote_code or given.trust_remote_code,
        builder=given.builder or found.builder,
        revision=given.revision or found.revision,
        override_config=given.override_config,
        tokenizer_revision=given.tokenizer_revision or found.tokenizer_revision,
    )
    return msgspec.structs.replace(policy, spec=model)


def _begin(work: RunDir, spec: SFTSpec, resume: bool, force: bool) -> None:
    """Clears the working folder for a new start; for a resumed one, proves that it goes on with the same settings."""
    kept = work.path / "sft.json"
    if resume:
        before = msgspec.json.decode(kept.read_bytes(), type=SFTSpec)
        changed = [name for name in SFTSpec.__struct_fields__ if name != "out" and getattr(before, name) != getattr(spec, name)]
        if changed:
            was = ", ".join(f"{name}={msgspec.to_builtins(getattr(before, name))}" for name in changed)
            raise ConfigError(f"{work.path} was begun with {was}: to resume to the bit repeat that; to start over add --force")
        return
    if work.steps() and not force:
        raise ConfigError(
            f"{work.path} holds checkpoints of an unfinished warm start, which would be lost: go on with --resume, or start "
            "over with --force"
        )
    for folder in (work.checkpoints, work.tensorboard):
        shutil.rmtree(folder, ignore_errors=True)
    work.metrics.unlink(missing_ok=True)
    write_atomic(kept, msgspec.json.format(msgspec.json.encode(spec)))


def _train(spec: SFTSpec, policy: Policy, work: RunDir, ranks: "Ranks", observe: "Observe | None" = None) -> SFTResult:
    """What every rank does. The first one tells `observe`, and makes the folder; results of others are the same."""
    from asyncrl.learn.sft import SupervisedTrainer, fit
    from asyncrl.learn.sft_run import Journal
    from asyncrl.learn.together import export_together
    from asyncrl.models.lora import add_adapters
    from asyncrl.models.sharding import shard

    device = device_of(spec)
    model, tokenizer = load(policy, ranks=ranks)
    examples, too_long = _read(spec.data.files, spec, policy, model, tokenizer)
    heldout = _read(spec.data.heldout, spec, policy, model, tokenizer)[0] if spec.data.heldout else []
    if spec.lora is not None:
        add_adapters(model, spec.lora, policy.spec, spec.seed, ranks)
    shard(model, ranks, spec.precision, device)
    steps, bound = spec.total_steps(len(examples)), spec.max_tokens_per_pack
    trainer = SupervisedTrainer(model, spec, steps, max_tokens_per_pack=bound, ranks=ranks)
    learned = sum(len(example.scored) for example in examples)
    said = "%d examples (%d too long) with %d tokens to learn; %d steps on %s"
    log.info(said, len(examples), too_long, learned, steps, device)
    with closing(Journal(spec, work, trainer, examples, heldout, observe, ranks)) as journal:
        done = journal.start()
        fit(trainer, examples, batch=min(spec.batch, len(examples)), seed=spec.seed, done=done, on_step=journal.step)
    out = Path(spec.out).expanduser().absolute()
    export_together(model, tokenizer, out, ranks, "export")
    return SFTResult(
        out=str(out),
        steps=steps,
        examples=len(examples),
        too_long=too_long,
        loss=journal.loss,
        first_heldout_loss=trainer.state["first_heldout"] if heldout else None,
        last_heldout_loss=journal.last_heldout if heldout else None,
    )


def _read(
    files: Sequence[str], spec: SFTSpec, policy: Policy, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase"
) -> "tuple[list[TokenSequence], int]":
    """Makes files into sequences, and the number of those that were too long."""
    from asyncrl.models.packed import TokenSequence
    from asyncrl.models.tokenizing import stop_token_ids

    config = model.config.get_text_config(decoder=True)
    longest = min(spec.data.max_length, getattr(config, "max_position_embeddings", None) or sys.maxsize)
    found = read_demonstrations(files, spec.data, tokenizer, stop_token_ids(tokenizer, policy.spec), longest)
    highest = max(int(ids.max()) for ids, _ in found.examples)
    if highest >= config.vocab_size:
        raise ConfigError(
            f"the tokenizer makes token {highest}, and the model knows {config.vocab_size}: they do not belong together; "
            "set model.tokenizer"
        )
    return [TokenSequence(ids, learned) for ids, learned in found.examples], found.too_long


if __name__ == "__main__":  # a rank that `together` started
    _, folder, rank, port, lifeline = sys.argv
    end_with_owner(int(lifeline))
    set_up_logging(StandardError())
    work = RunDir(Path(folder))
    spec = msgspec.json.decode((work.path / "sft.json").read_bytes(), type=SFTSpec)
    _train(spec, _start(spec), work, join_at(int(port), ranks_of(spec), int(rank)))
    os._exit(0)  # the first rank may have left the group already: nothing here needs it any more
