"""Two-digit addition and subtraction, learned on two cores: the shortest whole run there is.

    prompt   <user>12+45=<assistant>          operands padded to two digits; subtractions never go below zero
    response 750<eos>                         three digits, lowest first: 57

`prepare` makes everything on the spot, seeded by `recipe.seed`: a train and a held-out set of distinct problems in verl's
parquet schema, a character tokenizer with a chat template, and a Qwen3-architecture policy of 0.8M parameters. The policy
has an SFT warm start on careless demonstrations: three in four forget every carry and borrow. So it is mediocre, knowing
the right way but seldom going it, and asynchronous PPO against the exact reward improves it: held-out exact match (greedy)
rises from about 0.4 to above 0.95. A second run in the same run directory finds the warm policy there and skips the warm start.

    asyncrl run recipes/arithmetic.py
    asyncrl run recipes/arithmetic.py staleness.max_lag=0 --name synchronous
"""

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from asyncrl import Recipe
from asyncrl.config import (
    CheckpointSpec,
    DataSpec,
    EvaluationSpec,
    LearnerSpec,
    ModelSpec,
    RewardSpec,
    SamplingSpec,
    StalenessSpec,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

recipe = Recipe(
    name="arithmetic",
    prepare="arithmetic.py:prepare",
    model=ModelSpec(path="{run}/data/warm"),
    data=DataSpec(files=("{run}/data/train.parquet",), max_prompt_length=8),
    reward=RewardSpec(function="arithmetic.py:compute_score", deadline_s=5.0),
    sampling=SamplingSpec(n=8, max_response_length=4),
    staleness=StalenessSpec(max_lag=4),
    learner=LearnerSpec(batch_groups=32, lr=2.5e-4, betas=(0.9, 0.99), warmup_steps=20, lr_schedule="cosine", min_lr_ratio=0.1),
    evaluation=EvaluationSpec(files=("{run}/data/heldout.parquet",), freq=25),
    checkpoint=CheckpointSpec(save_freq=50),
    total_steps=200,
)

HELD_OUT, TRAIN = 512, 8192
CARELESS_SHARE = 0.75
WARM_STEPS, WARM_BATCH, WARM_LR = 600, 64, 2e-3


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: dict | None = None) -> float:
    """1 for exactly the right digits, else 0."""
    return float(solution_str == ground_truth)


class Problem(NamedTuple):
    left: int
    sign: str
    right: int

    @property
    def text(self) -> str:
        return f"{self.left:02d}{self.sign}{self.right:02d}="

    @property
    def messages(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.text}]

    @property
    def answer(self) -> str:
        return _digits(self.left + self.right if self.sign == "+" else self.left - self.right)

    @property
    def careless_answer(self) -> str:
        """Digit by digit, every carry and borrow forgotten."""
        way = 1 if self.sign == "+" else -1
        tens, ones = (self.left // 10 + way * (self.right // 10)) % 10, (self.left + way * self.right) % 10
        return _digits(10 * tens + ones)


def _digits(number: int) -> str:
    return f"{number:03d}"[::-1]


def prepare(recipe: Recipe, run_dir: Path) -> None:
    """Makes `{run}/data`: train.parquet, heldout.parquet and the warm policy; nothing that is there already for this seed."""
    from asyncrl.rundir import write_atomic

    folder = run_dir / "data"
    made = folder / "warm" / "made.json"
    settings = json.dumps([recipe.seed, TRAIN, HELD_OUT, CARELESS_SHARE, WARM_STEPS, WARM_BATCH, WARM_LR])
    if made.exists() and made.read_text() == settings:
        return
    made.unlink(missing_ok=True)
    problems = _problems(recipe.seed)
    _write_parquet(folder / "heldout.parquet", _rows(problems[:HELD_OUT], "test"))
    _write_parquet(folder / "train.parquet", _rows(problems[HELD_OUT:], "train"))
    _warm_up(folder, problems[HELD_OUT:], recipe.seed)
    write_atomic(made, settings)


def _problems(seed: int) -> list[Problem]:
    """Distinct problems in random order; a third are subtractions."""
    rng, found = random.Random(seed), dict[Problem, None]()
    while len(found) < HELD_OUT + TRAIN:
        sign, left, right = rng.choice("++-"), rng.randrange(100), rng.randrange(100)
        if sign == "-":
            left, right = max(left, right), min(left, right)
        found[Problem(left, sign, right)] = None
    return list(found)


def _rows(problems: list[Problem], split: str) -> list[dict[str, Any]]:
    return [
        {
            "data_source": "addition" if problem.sign == "+" else "subtraction",
            "prompt": problem.messages,
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": problem.answer},
            "extra_info": {"split": split, "index": index},
        }
        for index, problem in enumerate(problems)
    ]


def _write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)


def make_tokenizer() -> "PreTrainedTokenizerFast":
    """One token per character, and a chat template that wraps each turn in its role's token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<user>", "<assistant>"]
    vocabulary = {token: index for index, token in enumerate([*special, *"0123456789+-="])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", additional_special_tokens=special[2:]
    )
    tokenizer.chat_template = (
        "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return tokenizer


def make_model(seed: int) -> "Qwen3ForCausalLM":
    """Qwen3's architecture with 815,360 parameters, random."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=17,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=32,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    return Qwen3ForCausalLM(config)


def _warm_up(folder: Path, problems: list[Problem], seed: int) -> None:
    """The SFT warm start on careless demonstrations: `{folder}/warm` from a random policy."""
    import torch

    from asyncrl.config import DemonstrationsSpec, SFTSpec
    from asyncrl.jobs.sft import train
    from asyncrl.models.loading import export

    rng = random.Random(seed)
    shown = []
    for _ in range(WARM_STEPS * WARM_BATCH):
        problem = rng.choice(problems)
        shown.append((problem, problem.careless_answer if rng.random() < CARELESS_SHARE else problem.answer))
    # What the chat template would write, 38,400 times.
    rows = [{"prompt": f"<user>{problem.text}<assistant>", "response": answer} for problem, answer in shown]
    _write_parquet(folder / "demonstrations.parquet", rows)
    export(make_model(seed), make_tokenizer(), folder / "random")
    spec = SFTSpec(
        model=ModelSpec(path=str(folder / "random")),
        data=DemonstrationsSpec(files=(str(folder / "demonstrations.parquet"),)),
        out=str(folder / "warm"),
        batch=WARM_BATCH,
        lr=WARM_LR,
        warmup_steps=20,
        save_freq=None,
        device="cpu",
        seed=seed,
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # matrices this small lose more by waiting for a second thread than they gain
    train(spec, force=True)
    torch.set_num_threads(threads)
