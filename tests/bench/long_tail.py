"""A task with long-tailed answer lengths: count down from N to 0, N log-normal. For tests/bench/staleness.py.

    prompt   <user>43<assistant>              one token per number
    answer   42 41 40 … 0<eos>                N tokens and the end: median 12, and one in a hundred has 100 or more

The warm policy skips a number at most tens, as most of its demonstrations do. The score is the share of the answer that is
right before its first mistake. What to do at 130 is learned from long answers alone: a staleness rule that trains fewer of
them scores lower on them.
"""

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING

from asyncrl import Recipe
from asyncrl.config import (
    AlgorithmSpec,
    CheckpointSpec,
    DataSpec,
    EvaluationSpec,
    LearnerSpec,
    ModelSpec,
    RewardSpec,
    SamplingSpec,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

LONGEST, MEDIAN, SIGMA = 160, 12, 0.9
TRAIN = 8192
SKIP_SHARE = 0.6
WARM_STEPS, WARM_BATCH, WARM_LR = 300, 32, 2e-3

recipe = Recipe(
    name="long_tail",
    prepare="long_tail.py:prepare",
    model=ModelSpec(path="{run}/data/warm"),
    data=DataSpec(files=("{run}/data/train.jsonl",), max_prompt_length=8),
    reward=RewardSpec(function="long_tail.py:compute_score", deadline_s=5.0),
    sampling=SamplingSpec(n=4, max_response_length=LONGEST + 1),
    algorithm=AlgorithmSpec(behaviour_cap=2.0),
    learner=LearnerSpec(batch_groups=8, lr=3e-4, betas=(0.9, 0.99), warmup_steps=20, lr_schedule="cosine", min_lr_ratio=0.1),
    evaluation=EvaluationSpec(files=("{run}/data/heldout.jsonl",), freq=100),
    checkpoint=CheckpointSpec(save_freq=200),
    total_steps=400,
)


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: dict | None = None) -> float:
    """Share of the answer before the first mistake; 1 for all of it and nothing after it."""
    wanted, found = ground_truth.split(), solution_str.split()
    right = next((i for i, (a, b) in enumerate(zip(wanted, found, strict=False)) if a != b), min(len(wanted), len(found)))
    return (right + (wanted == found)) / (len(wanted) + 1)


def countdown(start: int, rng: random.Random | None = None) -> list[str]:
    """start − 1 … 0; with a generator, most tens are skipped."""
    numbers = range(start - 1, -1, -1)
    return [str(n) for n in numbers if not (rng and n % 10 == 0 and n > 0 and rng.random() < SKIP_SHARE)]


def prepare(recipe: Recipe, run_dir: Path) -> None:
    """Makes `{run}/data`: train.jsonl, heldout.jsonl (every N from 1 on, once) and the warm policy, unless it is there."""
    from asyncrl.rundir import atomic_folder

    folder = run_dir / "data"
    if (folder / "warm").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(recipe.seed)
    starts = [min(LONGEST, max(1, round(rng.lognormvariate(0, SIGMA) * MEDIAN))) for _ in range(TRAIN)]
    _write(folder / "train.jsonl", starts)
    _write(folder / "heldout.jsonl", range(1, LONGEST + 1))
    tokenizer, model = make_tokenizer(), make_model(recipe.seed)
    _warm_up(model, tokenizer, recipe.seed)
    with atomic_folder(folder / "warm") as warm:
        model.save_pretrained(warm)
        tokenizer.save_pretrained(warm)


def _write(path: Path, starts: "list[int] | range") -> None:
    rows = [
        {
            "data_source": "long" if start >= 40 else "short",
            "prompt": [{"role": "user", "content": str(start)}],
            "reward_model": {"ground_truth": " ".join(countdown(start))},
        }
        for start in starts
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_tokenizer() -> "PreTrainedTokenizerFast":
    """One token per number, numbers parted by spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<user>", "<assistant>"]
    vocabulary = {token: index for index, token in enumerate([*special, *map(str, range(LONGEST + 1))])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", additional_special_tokens=special[2:]
    )
    tokenizer.chat_template = (
        "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return tokenizer


def make_model(seed: int) -> "Qwen3ForCausalLM":
    """Qwen3's architecture with 0.3M parameters, random."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=LONGEST + 5,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=LONGEST + 16,
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    return Qwen3ForCausalLM(config)


def _warm_up(model: "Qwen3ForCausalLM", tokenizer: "PreTrainedTokenizerFast", seed: int) -> None:
    """Supervised learning on careless demonstrations of every length."""
    import numpy as np

    from asyncrl.config import OptimizerSpec
    from asyncrl.learn import sft
    from asyncrl.models.packed import TokenSequence

    rng = random.Random(seed)
    examples = []
    for _ in range(WARM_STEPS * WARM_BATCH):
        start = rng.randint(1, LONGEST)
        prompt = tokenizer.encode(f"<user>{start}<assistant>")
        ids = np.array([*prompt, *tokenizer.convert_tokens_to_ids([*countdown(start, rng), "<eos>"])])
        examples.append(TokenSequence(ids, np.arange(len(prompt), len(ids))))
    spec = OptimizerSpec(lr=WARM_LR, warmup_steps=20, lr_schedule="cosine", min_lr_ratio=0.1)
    trainer = sft.SupervisedTrainer(model, spec, WARM_STEPS, max_tokens_per_pack=2048)
    sft.fit(trainer, examples, batch=WARM_BATCH, seed=seed)
