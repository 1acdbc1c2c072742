"""Environments of verifiers, unmodified, in interpreters of their own: to 0.3.1, and of `verifiers.v1` (0.4)."""

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from asyncrl.config import EpisodeSpec
from asyncrl.episodes.chat import TemplateChat
from asyncrl.episodes.children import EpisodePool
from asyncrl.episodes.host import EpisodeHost
from asyncrl.episodes.session import Budget
from asyncrl.types import Trajectory

WAIT_S = 120.0
pytestmark = pytest.mark.slow


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
    special = ["<pad>", "<eos>", "<system>", "<user>", "<assistant>"]
    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate([*special, *characters])}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("(?m:.)"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", additional_special_tokens=special[2:]
    )
    made.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}<eos>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return made


@pytest.fixture
def play(engine, tokenizer, make_ticket, tmp_path: Path) -> Iterator[Callable[..., list[Trajectory]]]:
    """play(row, answers, spec): an episode for each of the answers, one after the other in the same process."""
    hosts = []

    def run(row: dict[str, Any], answers: list[str], **spec: Any) -> list[Trajectory]:
        episode = EpisodeSpec(**spec)
        pool = EpisodePool(episode, tmp_path / "log", start_timeout_s=WAIT_S)
        budget = Budget(tokens=1000, turn_tokens=200, context=4000)
        hosts.append(EpisodeHost(engine, pool, TemplateChat(tokenizer, (1,)), episode, budget, lambda *_: json.dumps(row)))
        made = []
        for group, answer in enumerate(answers):
            engine.answers = [*tokenizer.encode(answer, add_special_tokens=False), 1]
            made.append(hosts[-1].submit(make_ticket(group=group))[0].result(WAIT_S))
        return made

    yield run
    for host in hosts:
        host.close()


def ends(episodes: list[Trajectory]) -> list[tuple[str, str]]:
    return [(made.episode.status, made.episode.error) for made in episodes]


def test_reasoning_gym_of_verifiers_0_3(interpreter, play, tokenizer) -> None:
    """`ReasoningGymEnv`, which verifiers ships: its rubric's reward, its metrics, its system prompt."""
    python = interpreter("verifiers[rg]==0.3.1")
    show = "import json, verifiers as vf; e = vf.ReasoningGymEnv('chain_sum', 2, 0); "
    show += "print(json.dumps([e.get_dataset()[1], e.rg_dataset[1]['answer']]))"
    row, right = json.loads(subprocess.check_output([python, "-c", show], text=True).splitlines()[-1])
    answers = [f"<answer>{right}</answer>", "<answer>none</answer>", right]
    arguments = {"gym": "chain_sum", "num_train_examples": 2, "num_eval_examples": 0}
    made = play(row, answers, agent="verifiers:ReasoningGymEnv", arguments=arguments, python=python)
    assert ends(made) == [("ok", "")] * 3
    assert made[0].episode.reward == 1.0
    assert made[1].episode.reward < 0.1
    assert [one.episode.parts["format_reward_func"] for one in made] == [1.0, 1.0, 0.2]
    for one, answer in zip(made, answers, strict=True):
        prompt = tokenizer.decode(one.prompt_ids)
        assert prompt.startswith("<system>Given a problem")
        assert row["prompt"][-1]["content"] in prompt
        assert one.token_ids == [*tokenizer.encode(answer, add_special_tokens=False), 1]
        assert one.loss_mask == [1] * len(one.token_ids)


def test_reverse_text_of_verifiers_0_4(interpreter, play, tokenizer) -> None:
    """A task set as its authors publish it, with verifiers' own `null` harness, a program that it starts for each episode."""
    python = interpreter("verifiers==0.4.0", "uv")
    row = {"prompt": "stressed", "system_prompt": "Reverse it.", "answer": "desserts"}
    arguments = {"taskset.id": "reverse-text", "agent.harness.id": "null", "agent.runtime.type": "subprocess"}
    answers = ["<reversed_text>desserts</reversed_text>", "<reversed_text>stressed</reversed_text>"]
    made = play(row, answers, agent="verifiers.v1:load_environment", arguments=arguments, python=python)
    assert ends(made) == [("ok", "")] * 2
    assert made[0].episode.reward == made[0].episode.parts["lcs"] == 1.0
    assert 0.0 < made[1].episode.reward < 1.0
    assert tokenizer.decode(made[0].prompt_ids) == "<system>Reverse it.<user>stressed<assistant>"
    assert made[0].token_ids == [*tokenizer.encode(answers[0], add_special_tokens=False), 1]


def test_an_environment_that_cannot_be_made_is_told_at_the_start(interpreter, play) -> None:
    python = interpreter("verifiers==0.4.0", "uv")
    with pytest.raises(
        Exception, match=r"episode\.agent: load_environment with episode\.arguments=.* can't be made: .*nowhere"
    ):
        play({}, [], agent="verifiers.v1:load_environment", arguments={"taskset.id": "nowhere"}, python=python)
