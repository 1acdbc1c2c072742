"""What a supervised warm start does: `SFTSpec`, the whole configuration of `asyncrl sft`, every default included. No torch."""

from typing import Literal

from asyncrl.config.base import Spec, require
from asyncrl.config.learner import ModelSpec, OptimizerSpec, check_optimizer


class DemonstrationsSpec(Spec, frozen=True, kw_only=True):
    """Demonstrations in parquet or JSONL: a prompt (chat messages or a string) and the response to it, in two columns.

    messages_key: set, it names a column of whole conversations instead, of which every assistant turn is learned. All keys
    may be dotted paths. heldout: files whose loss is reported, and never trained.
    max_length: tokens of prompt and response; longer examples, or such as the model has no positions for, are left out and
    counted.
    """

    files: tuple[str, ...]
    heldout: tuple[str, ...] = ()
    prompt_key: str = "prompt"
    response_key: str = "response"
    messages_key: str = ""
    max_length: int = 2048

    def __post_init__(self) -> None:
        require(len(self.files) > 0, "data.files=(): there is nothing to learn from; name at least one parquet or JSONL file")
        require(
            self.max_length >= 2,
            f"data.max_length={self.max_length} < 2 tokens: a prompt and a response need one each; raise it",
        )


class SFTSpec(OptimizerSpec, frozen=True, kw_only=True):
    """A supervised warm start: `model`, trained on `data`, becomes the Hugging Face folder `out`.

    batch: examples per step. epochs or steps: how long; neither is one epoch. The last batch of the last epoch is filled up.
    A step has the gradient of the mean loss over the batch's learned tokens; the optimizer is set as the learner's.
    eval_freq: steps between two held-out losses; also at the start and at the end. save_freq: steps between checkpoints,
    from which an interrupted warm start resumes to the bit; null: none. device: empty is a GPU if there is one.
    """

    model: ModelSpec
    data: DemonstrationsSpec
    out: str
    batch: int = 64
    epochs: int | None = None
    steps: int | None = None
    seed: int = 0
    lr: float = 1e-5
    lr_schedule: Literal["constant", "cosine"] = "cosine"
    min_lr_ratio: float = 0.1
    max_tokens_per_pack: int = 16384
    eval_freq: int = 50
    save_freq: int | None = 200
    device: str = ""

    def __post_init__(self) -> None:
        require(bool(self.out), "out='': the trained policy would be lost; name a folder to write")
        require(
            self.epochs is None or self.steps is None,
            f"epochs={self.epochs} and steps={self.steps}: it is not clear how long to train; set one of the two",
        )
        for name in ("batch", "epochs", "steps", "max_tokens_per_pack"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name}={value} < 1: nothing would be trained; use at least 1")
        require(self.lr > 0, f"lr={self.lr} <= 0: nothing would be learned; use a rate > 0, for example 1e-5")
        check_optimizer(self, "")
        require(self.eval_freq >= 1, f"eval_freq={self.eval_freq} < 1; to turn it off leave data.heldout empty")
        require(
            self.save_freq is None or self.save_freq >= 1,
            f"save_freq={self.save_freq} < 1; use null for no checkpoints at all",
        )

    def total_steps(self, examples: int) -> int:
        """Steps over so many examples: each once per epoch, the last batch filled up."""
        size = min(self.batch, examples)
        return self.steps if self.steps is not None else -(-examples * (self.epochs or 1) // size)
