"""An agent of the OpenAI SDK, as anyone writes one, trained as it is: it lets the model use a pocket calculator.

    <user>23*47+58<assistant><tool_call>… 23*47 …</tool_call><eos><tool>1081
    <assistant><tool_call>… 1081+58 …</tool_call><eos><tool>1139<assistant>1139<eos>                            reward 1

`solve` is the agent. It speaks to `base_url`, behind which asyncrl has the policy and records each token; nothing else in it is
asyncrl's. The calculator does one operation at a time. `prepare` makes everything on the spot: rows, a tokenizer, and a
Qwen3-architecture policy that learned from an impatient demonstrator: at each turn he gives up two times in three, and says
what the display shows, or any number if it shows none. Asynchronous GRPO on the exact reward teaches it to go on: of sums it
has not seen, sampled at temperature 1, it gets 0.10 right at the start, 0.91 after 20 updates and 0.93 after 40 (seed 0).

    pip install 'asyncrl[agents]' openai
    asyncrl run recipes/calculator_agent.py
"""

import json
import random
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openai import AsyncOpenAI
from pointers import SPECIAL, make_data

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
from asyncrl.episodes.environments import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

recipe = Recipe(
    name="calculator_agent",
    prepare="calculator_agent.py:prepare",
    model=ModelSpec(path="{run}/data/warm"),
    data=DataSpec(files=("{run}/data/train.jsonl",), max_prompt_length=16),
    reward=RewardSpec(function="asyncrl.reward.verify:episode"),
    sampling=SamplingSpec(n=8, max_response_length=12),
    episode=EpisodeSpec(agent="calculator_agent.py:solve", max_turns=4, in_flight=64),
    staleness=StalenessSpec(max_lag=4),
    learner=LearnerSpec(batch_groups=16, lr=3e-4, betas=(0.9, 0.99), warmup_steps=10, lr_schedule="cosine", min_lr_ratio=0.1),
    evaluation=EvaluationSpec(files=("{run}/data/heldout.jsonl",), freq=20, temperature=1.0),
    checkpoint=CheckpointSpec(save_freq=40),
    total_steps=40,
)

CLIENT = AsyncOpenAI(base_url="http://-", api_key="-")  # one for all episodes: to make one takes longer than a call
CALCULATOR = {
    "type": "function",
    "function": {
        "name": "calculate",
        "description": "One operation on two numbers.",
        "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]},
    },
}
TRAIN, WARM_STEPS, PATIENCE = 4096, 500, 0.33
CALL, END = '<tool_call>{"name": "calculate", "arguments": {"expression": "', '"}}</tool_call>'


async def solve(task: Task, *, base_url: str, api_key: str, model: str) -> float:
    client = CLIENT.with_options(base_url=base_url, api_key=api_key)
    messages: list[Any] = list(task.row["prompt"])
    while True:
        got = await client.chat.completions.create(model=model, messages=messages, tools=[CALCULATOR], max_tokens=12)
        answer = got.choices[0].message
        messages.append(answer)
        for call in answer.tool_calls or ():
            try:
                shown = calculate(**json.loads(call.function.arguments))
            except (ValueError, TypeError):  # nothing that can be read, or other arguments
                shown = "E"
            messages.append({"role": "tool", "tool_call_id": call.id, "content": shown})
        if not answer.tool_calls or len(messages) > 7:
            return float(answer.content == task.row["reward_model"]["ground_truth"])


def calculate(expression: str) -> str:
    """What the display shows: four digits, or E."""
    if not (parts := re.fullmatch(r"(\d{1,4})([-+*])(\d{1,4})", expression)):
        return "E"
    left, sign, right = int(parts[1]), parts[2], int(parts[3])
    value = left * right if sign == "*" else left + right if sign == "+" else left - right
    return f"{value:04d}" if 0 <= value <= 9999 else "E"


def make_row(rng: random.Random) -> dict[str, Any]:
    left, right, last = (rng.randint(10, 99) for _ in range(3))
    first, second = f"{left}{rng.choice('*+')}{right}", f"{rng.choice('+-')}{last}"
    answer = calculate(calculate(first) + second)
    if answer == "E":  # below zero
        return make_row(rng)
    return {
        "data_source": "calculator",
        "prompt": [{"role": "user", "content": first + second}],
        "reward_model": {"ground_truth": answer},
    }


def prepare(recipe: Recipe, run_dir: Path) -> None:
    """Makes `{run}/data`: train.jsonl, heldout.jsonl and the warm policy, unless it is there."""
    make_data(run_dir / "data", recipe.seed, TRAIN, make_row, make_tokenizer, demonstration, WARM_STEPS, positions=128)


def make_tokenizer() -> "PreTrainedTokenizerFast":
    """One token per character, but for what stands before and behind a call's expression."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *"0123456789-+*E"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    backend.decoder = decoders.Fuse()
    backend.add_tokens([CALL, END])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", additional_special_tokens=SPECIAL[2:]
    )
    tokenizer.chat_template = (
        "{% for message in messages %}<{{ message.role }}>{{ message.content }}"
        "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
        "{% if message.role == 'assistant' %}<eos>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return tokenizer


def demonstration(rng: random.Random) -> list[tuple[str, list[str]]]:
    """One that gives up too soon, most often: who speaks, and what tokens."""
    sum_ = make_row(rng)["prompt"][0]["content"]
    play, display, rest = [("user", [*sum_])], "", [sum_[:5], sum_[5:]]
    while rest and rng.random() < PATIENCE:
        expression = display + rest.pop(0)
        display = calculate(expression)
        play += [("assistant", [CALL, *expression, END]), ("tool", [*display])]
    return [*play, ("assistant", [*(display or f"{rng.randrange(9999):04d}")])]
