"""Follow the pointers: an episode of several turns, in which the answer stands only in what the environment says.

    <user>find k<assistant>call k<eos><tool>-> c<assistant>call c<eos><tool>= 37<assistant>say 37<eos>           reward 1

A key leads to another key or to a number, over one to three hops; every row has a table of its own, which only `Pointers`
knows. Four turns at most. `prepare` makes everything on the spot: rows, a tokenizer of words, and a Qwen3-architecture policy
that learned from a demonstrator who gives up too soon: at each turn without the answer he looks on one time in four, and
else says some number. Asynchronous GRPO on the exact reward teaches it patience: sampled success rises from below 0.15 to
above 0.8, and greedy play finds nearly every number.

    asyncrl run recipes/pointers.py
"""

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asyncrl import Recipe
from asyncrl.config import (
    CheckpointSpec,
    DataSpec,
    EpisodeSpec,
    EvaluationSpec,
    LearnerSpec,
    ModelSpec,
    RewardSpec,
    SamplingSpec,
    StalenessSpec,
)
from asyncrl.episodes.environments import Step, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

recipe = Recipe(
    name="pointers",
    prepare="pointers.py:prepare",
    model=ModelSpec(path="{run}/data/warm"),
    data=DataSpec(files=("{run}/data/train.jsonl",), max_prompt_length=8),
    reward=RewardSpec(function="asyncrl.reward.verify:episode"),
    sampling=SamplingSpec(n=8, max_response_length=4),
    episode=EpisodeSpec(environment="pointers.py:Pointers", max_turns=4),
    staleness=StalenessSpec(max_lag=4),
    learner=LearnerSpec(batch_groups=32, lr=3e-4, betas=(0.9, 0.99), warmup_steps=10, lr_schedule="cosine", min_lr_ratio=0.1),
    evaluation=EvaluationSpec(files=("{run}/data/heldout.jsonl",), freq=25),
    checkpoint=CheckpointSpec(save_freq=50),
    total_steps=100,
)

KEYS, NUMBERS, HOPS = "abcdefghijklmnopqrstuvwxyz", 50, 3
TRAIN, HELD_OUT = 8192, 256
WARM_STEPS, WARM_BATCH, WARM_LR, PATIENCE = 600, 64, 3e-3, 0.25
SPECIAL = ["<pad>", "<eos>", "<user>", "<assistant>", "<tool>"]
Demonstration = Callable[[random.Random], list[tuple[str, list[str]]]]  # who speaks, and what tokens
WORDS = ["find", "call", "say", "->", "=", "?", *KEYS, *map(str, range(NUMBERS))]


class Pointers:
    """`call KEY` shows what the table has for the key; `say NUMBER` ends the episode."""

    def reset(self, task: Task) -> list[dict[str, str]]:
        self._table, self._answer = task.row["extra_info"]["table"], task.row["reward_model"]["ground_truth"]
        return task.row["prompt"]  # type: ignore[no-any-return]

    def step(self, reply: dict[str, str]) -> Step:
        match reply["content"].split():
            case ["call", key] if key in self._table:
                found = self._table[key]
                return Step(messages=({"role": "tool", "content": f"{'=' if found.isdigit() else '->'} {found}"},))
            case ["say", number]:
                return Step(reward=float(number == self._answer), done=True)
        return Step(messages=({"role": "tool", "content": "?"},))


def make_row(rng: random.Random) -> dict[str, Any]:
    """A table of all keys, where to start, and what number that leads to."""
    chain = rng.sample(KEYS, rng.randint(1, HOPS))
    table = {key: str(rng.randrange(NUMBERS)) for key in KEYS}
    answer = table[chain[-1]]
    table |= dict(itertools.pairwise(chain))
    return {
        "data_source": f"{len(chain)} hops",
        "prompt": [{"role": "user", "content": f"find {chain[0]}"}],
        "reward_model": {"ground_truth": answer},
        "extra_info": {"table": table},
    }


def prepare(recipe: Recipe, run_dir: Path) -> None:
    """Makes `{run}/data`: train.jsonl, heldout.jsonl and the warm policy, unless it is there."""
    make_data(run_dir / "data", recipe.seed, TRAIN, make_row, make_tokenizer, demonstration, WARM_STEPS, positions=64)


def make_data(
    folder: Path,
    seed: int,
    train: int,
    row: Callable[[random.Random], dict[str, Any]],
    tokenizer: "Callable[[], PreTrainedTokenizerFast]",
    demonstration: Demonstration,
    steps: int,
    positions: int,
) -> None:
    """Rows, and a policy that has learned for so many steps what a demonstrator says."""
    from asyncrl.rundir import atomic_folder

    if (folder / "warm").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    for name, count in (("train", train), ("heldout", HELD_OUT)):
        rows = (json.dumps(row(rng)) + "\n" for _ in range(count))
        (folder / f"{name}.jsonl").write_text("".join(rows))
    made = tokenizer()
    model = make_model(seed, len(made), positions)
    _warm_up(model, made.get_vocab(), demonstration, steps, seed)
    with atomic_folder(folder / "warm") as warm:
        model.save_pretrained(warm)
        made.save_pretrained(warm)


def make_tokenizer() -> "PreTrainedTokenizerFast":
    """One token per word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", additional_special_tokens=SPECIAL[2:]
    )
    tokenizer.chat_template = (
        "{% for message in messages %}<{{ message.role }}>{{ message.content }}"
        "{% if message.role == 'assistant' %}<eos>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return tokenizer


def make_model(seed: int, vocabulary: int, positions: int) -> "Qwen3ForCausalLM":
    """Qwen3's architecture with two layers of 96, random."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=24,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    return Qwen3ForCausalLM(config)


def demonstration(rng: random.Random) -> list[tuple[str, list[str]]]:
    """One that gives up too soon, most often."""
    row, play, environment = make_row(rng), [], Pointers()
    task = Task(row=row, group=0, rollout=0, attempt=0, seed=0, purpose="train")
    heard = environment.reset(task)
    for _ in range(HOPS + 1):
        play += heard
        kind, found = heard[-1]["content"].split()
        if kind != "=" and rng.random() >= PATIENCE:
            kind, found = "=", str(rng.randrange(NUMBERS))
        play.append({"role": "assistant", "content": f"{'say' if kind == '=' else 'call'} {found}"})
        step = environment.step(play[-1])
        if step.done:
            break
        heard = list(step.messages)
    return [(message["role"], message["content"].split()) for message in play]


def _warm_up(
    model: "Qwen3ForCausalLM",
    vocabulary: dict[str, int],
    demonstration: Demonstration,
    steps: int,
    seed: int,
) -> None:
    """Supervised learning of what the demonstrator says, in the context in which he says it."""
    import numpy as np

    from asyncrl.config import OptimizerSpec
    from asyncrl.learn import sft
    from asyncrl.models.packed import TokenSequence

    rng, examples = random.Random(seed), []
    for _ in range(steps * WARM_BATCH):
        ids: list[int] = []
        scored: list[int] = []
        for role, tokens in demonstration(rng):
            own = [vocabulary[token] for token in (f"<{role}>", *tokens)]
            if role == "assistant":
                own.append(vocabulary["<eos>"])
                scored += range(len(ids) + 1, len(ids) + len(own))
            ids += own
        examples.append(TokenSequence(np.array(ids), np.array(scored)))
    spec = OptimizerSpec(lr=WARM_LR, warmup_steps=20, lr_schedule="cosine", min_lr_ratio=0.1)
    trainer = sft.SupervisedTrainer(model, spec, steps, max_tokens_per_pack=2048)
    sft.fit(trainer, examples, batch=WARM_BATCH, seed=seed)
