"""Families that write conversations and calls of tools in ways of their own: tokens stay, calls are read, mistakes are told.

Their real tokenizers are on a hub: these have their special tokens, and one token for every byte.
"""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from asyncrl.episodes.chat import UNREADABLE, Chat, Turn
from asyncrl.episodes.families import chat_of
from asyncrl.errors import ConfigError

pytest.importorskip("renderers", reason="pip install 'asyncrl[agents]'")

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look",
            "description": "Looks.",
            "parameters": {"type": "object", "properties": {"at": {"type": "integer"}}, "required": ["at"]},
        },
    }
]
IM = "<|im_start|> <|im_end|> <|endoftext|> <think> </think> <tool_call> </tool_call> <tool_response> </tool_response>"
DEEPSEEK = "begin▁of▁sentence end▁of▁sentence User Assistant tool▁sep " + " ".join(
    f"tool▁{what}▁{end}" for what in ("calls", "call", "outputs", "output") for end in ("begin", "end")
)
# Special tokens; those that end answers; a call as the family writes it, and one that can't be read (None: that is text).
FAMILIES: dict[str, tuple[str, str, str, str | None]] = {
    "llama-3": (
        "<|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> <|end_of_text|> <|eom_id|>",
        "<|eot_id|> <|end_of_text|> <|eom_id|>",
        '{"name": "look", "parameters": {"at": 1}}<|eot_id|>',
        None,
    ),
    "glm-5": (
        "[gMASK] <sop> <|system|> <|user|> <|assistant|> <|observation|> <|endoftext|> <arg_key> </arg_key> <arg_value> "
        "</arg_value> <think> </think> <tool_call> </tool_call> <tool_response> </tool_response>",
        "<|endoftext|> <|user|> <|observation|>",
        "Hm.</think><tool_call>look<arg_key>at</arg_key><arg_value>1</arg_value></tool_call><|observation|>",
        "Hm.</think><tool_call>look<arg_key>at</arg_key><arg_value>1<|observation|>",
    ),
    "qwen3.5": (
        IM + " <|vision_start|> <|vision_end|> <|image_pad|> <|video_pad|>",
        "<|im_end|> <|endoftext|>",
        "Hm.\n</think>\n\n<tool_call>\n<function=look>\n<parameter=at>\n1\n</parameter>\n</function>\n</tool_call><|im_end|>",
        "Hm.\n</think>\n\n<tool_call>\nlook(1)\n</tool_call><|im_end|>",
    ),
    "qwen3": (
        IM,
        "<|im_end|> <|endoftext|>",
        '<think>\nHm.\n</think>\n\n<tool_call>\n{"name": "look", "arguments": {"at": 1}}\n</tool_call><|im_end|>',
        '<tool_call>\n{"name": "look", "arguments": {"at": \n</tool_call><|im_end|>',
    ),
    "minimax-m2": (
        "]~!b[ ]~b] [e~[ <think> </think> <minimax:tool_call> </minimax:tool_call>",
        "[e~[",
        'Hm.\n</think>\n\n<minimax:tool_call>\n<invoke name="look">\n<parameter name="at">1</parameter>\n</invoke>\n'
        "</minimax:tool_call>[e~[",
        "Hm.\n</think>\n\n<minimax:tool_call>\nlook(1)\n</minimax:tool_call>[e~[",
    ),
    "kimi-k2": (
        "<|im_user|> <|im_assistant|> <|im_system|> <|im_middle|> <|im_end|> <|tool_calls_section_begin|> "
        "<|tool_calls_section_end|> <|tool_call_begin|> <|tool_call_argument_begin|> <|tool_call_end|>",
        "<|im_end|>",
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.look:0<|tool_call_argument_begin|>"
        '{"at": 1}<|tool_call_end|><|tool_calls_section_end|><|im_end|>',
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.look:0<|tool_call_argument_begin|>"
        '{"at": <|tool_call_end|><|tool_calls_section_end|><|im_end|>',
    ),
    "deepseek-v3": (
        " ".join(f"<｜{name}｜>" for name in DEEPSEEK.split()),
        "<｜end▁of▁sentence｜>",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>look\n```json\n"
        '{"at": 1}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>',
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>look\n```json\n"
        '{"at": \n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>',
    ),
    "gemma4": (
        "<bos> <eos> <|turn> <turn|> <|channel> <channel|> <|think|> <|tool> <tool|> <|tool_call> <tool_call|> "
        '<|tool_response> <tool_response|> <|image> <|image|> <image|> <|"|>',
        "<turn|> <|tool_response> <eos>",
        "<|tool_call>call:look{at:1}<tool_call|><|tool_response>",
        "<|tool_call>look(1)<tool_call|><|tool_response>",
    ),
}


def tokenizer_of(special: str) -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, additional_special_tokens=special.split())


def made(family: str) -> tuple[Chat, PreTrainedTokenizerFast]:
    special, stops, *_ = FAMILIES[family]
    tokenizer = tokenizer_of(special)
    return chat_of(tokenizer, tokenizer.convert_tokens_to_ids(stops.split()), family), tokenizer


@pytest.mark.parametrize("family", FAMILIES)
def test_a_call_is_read_and_its_answer_follows_the_very_tokens(family: str) -> None:
    chat, tokenizer = made(family)
    written = FAMILIES[family][2]
    prompt = chat.prompt([{"role": "user", "content": "Where is it?"}], TOOLS)
    assert "Where is it?" in tokenizer.decode(prompt)
    assert ("Looks." in tokenizer.decode(prompt)) == (family != "deepseek-v3")  # whose template shows no tools
    turn = Turn(prompt, tokenizer.encode(written, add_special_tokens=False), stopped=True)
    reply = chat.reply(turn, TOOLS)
    (call,) = reply["tool_calls"]
    assert call["function"] == {"name": "look", "arguments": {"at": 1}}
    assert reply["content"].strip() == ""
    assert reply.get("reasoning_content", "Hm.") == "Hm."
    assert ("reasoning_content" in reply) == ("Hm." in written)
    answer = {"role": "tool", "name": "look", "tool_call_id": call["id"], "content": "Behind you."}
    following = chat.next_prompt(turn, [answer], TOOLS)
    so_far = [*turn.prompt_ids, *turn.ids]
    assert following[: len(so_far)] == so_far
    assert "Behind you." in tokenizer.decode(following[len(so_far) :])
    second = Turn(following, tokenizer.encode("Hm.</think>Behind." if "Hm." in written else "Behind."), stopped=False)
    more = chat.next_prompt(second, [{"role": "user", "content": "And now?"}], TOOLS)
    assert more[: len(following) + len(second.ids)] == [*following, *second.ids]  # across a message of the user, cut by a limit
    assert "And now?" in tokenizer.decode(more)


@pytest.mark.parametrize("family", [family for family in FAMILIES if FAMILIES[family][3]])
def test_a_call_that_cannot_be_read_is_its_text(family: str) -> None:
    chat, tokenizer = made(family)
    turn = Turn(
        chat.prompt([{"role": "user", "content": "Where?"}], TOOLS),
        tokenizer.encode(FAMILIES[family][3], add_special_tokens=False),
        stopped=True,
    )
    (call,) = chat.reply(turn, TOOLS)["tool_calls"]
    assert call["function"]["name"] in ("look", UNREADABLE)
    assert isinstance(call["function"]["arguments"], str)


def test_what_cannot_be_followed_is_to_be_rendered_anew() -> None:
    """It stopped in the middle of its reasoning, which must be closed before anything follows."""
    chat, tokenizer = made("qwen3.5")
    prompt = chat.prompt([{"role": "user", "content": "Where?"}])
    turn = Turn(prompt, tokenizer.encode("Hm.<|im_end|>", add_special_tokens=False), stopped=True)
    assert chat.next_prompt(turn, [{"role": "user", "content": "Well?"}]) is None


def test_families_that_cannot_be() -> None:
    special, stops, *_ = FAMILIES["llama-3"]
    tokenizer = tokenizer_of(special)
    ids = tokenizer.convert_tokens_to_ids(stops.split())
    with pytest.raises(ConfigError, match=r"episode.chat='llama'.*'llama-3'"):
        chat_of(tokenizer, ids, "llama")
    with pytest.raises(ConfigError, match=r"episode.chat='glm-5'.*gMASK"):
        chat_of(tokenizer, ids, "glm-5")
    with pytest.raises(ConfigError, match=r"set model\.override_config\.eos_token_id"):
        chat_of(tokenizer, ids[:1], "llama-3")
    with pytest.raises(ConfigError, match="default"):
        chat_of(tokenizer, ids, "default")
