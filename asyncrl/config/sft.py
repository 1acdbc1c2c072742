"""What a supervised warm start does: `SFTSpec`, the whole configuration of `asyncrl sft`, every default included. No torch."""

from typing import Literal

from asyncrl.config.base import SEED_RULE, Rule, Spec, require, require_fields
from asyncrl.config.learner import OPTIMIZER_RULES, LoraSpec, ModelSpec, OptimizerSpec, PrecisionSpec
from asyncrl.config.parallel import ParallelSpec, layouts


class DemonstrationsSpec(Spec, frozen=True, kw_only=True):
    """Demonstrations in parquet or JSONL: a prompt and the response to it, or whole conversations. Keys may be dotted paths."""

    files: tuple[str, ...]  # what is learned
    heldout: tuple[str, ...] = ()  # files whose loss is reported, and never trained
    prompt_key: str = "prompt"  # column of prompts: chat messages, or strings
    response_key: str = "response"  # column of responses
    messages_key: str = ""  # column of whole conversations instead of both, of which every assistant turn is learned
    # Tokens of prompt and response; longer examples, or such as the model has no positions for, are left out and counted.
    max_length: int = 2048

    def __post_init__(self) -> None:
        require(len(self.files) > 0, "data.files=(): there is nothing to learn from; name at least one parquet or JSONL file")
        rule = ("max_length", lambda x: x >= 2, "< 2 tokens: a prompt and a response need one each; raise it")
        require_fields(self, "data.", [rule])


class SFTSpec(OptimizerSpec, frozen=True, kw_only=True):
    """A supervised warm start. A step has the gradient of the mean loss over the batch's learned tokens."""

    model: ModelSpec  # where it starts
    data: DemonstrationsSpec  # what it learns
    out: str  # Hugging Face folder to write
    batch: int = 64  # examples per step
    epochs: int | None = None  # how long, in passes over the data; the last batch of the last one is filled up
    steps: int | None = None  # how long, in steps; with neither it is one epoch
    seed: int = 0  # of the order of examples, and of adapters
    lora: LoraSpec | None = None  # adapters to train, and to merge in the end; null: the whole model
    lr: float = 1e-5  # learning rate, at its highest
    lr_schedule: Literal["constant", "cosine"] = "cosine"  # as the learner's
    min_lr_ratio: float = 0.1  # as the learner's
    max_tokens_per_pack: int = 16384  # as the learner's
    eval_freq: int = 50  # steps between two held-out losses; also at the start and at the end
    save_freq: int | None = 200  # steps between checkpoints, from which it resumes to the bit; null: none
    device: str = ""  # empty: a GPU if there is one
    ranks: int = 1  # processes of this machine that train together, each on a device of its own
    parallel: ParallelSpec = ParallelSpec()  # how they divide the model, as the learner's; what is auto is not divided so
    precision: PrecisionSpec = PrecisionSpec()  # as the learner's

    def __post_init__(self) -> None:
        require(bool(self.out), "out='': the trained policy would be lost; name a folder to write")
        require_fields(self, "", _RULES)
        layouts(self.parallel, self.ranks)
        require(
            self.epochs is None or self.steps is None,
            f"epochs={self.epochs} and steps={self.steps}: it is not clear how long to train; set one of the two",
        )

    def total_steps(self, examples: int) -> int:
        """Steps over so many examples: each once per epoch, the last batch filled up."""
        size = min(self.batch, examples)
        return self.steps if self.steps is not None else -(-examples * (self.epochs or 1) // size)


_RULES: tuple[Rule, ...] = (
    *OPTIMIZER_RULES,
    ("batch epochs steps max_tokens_per_pack ranks", lambda x: x >= 1, "< 1: nothing would be trained; use at least 1"),
    ("lr", lambda x: x > 0, "<= 0: nothing would be learned; use a rate > 0, for example 1e-5"),
    SEED_RULE,
    ("eval_freq", lambda x: x >= 1, "< 1; to turn it off leave data.heldout empty"),
    ("save_freq", lambda x: x >= 1, "< 1; use null for no checkpoints at all"),
)
