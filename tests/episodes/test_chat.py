"""Chat messages as token ids: what was sampled stays, and what is between answers is the template's."""

from types import SimpleNamespace

import pytest

from asyncrl.episodes.chat import Chat
from asyncrl.errors import ConfigError


def test_a_conversation_is_what_was_read_and_sampled(make_chat, ids) -> None:
    chat = make_chat()
    assert chat.prompt([{"role": "user", "content": "hello"}]) == ids("<user> hello nl <assistant>")
    message = {"role": "tool", "content": "look here"}
    assert chat.following([message], stopped=True) == ids("nl <tool> look here nl <assistant>")
    assert chat.following([message], stopped=False) == ids("<eos> nl <tool> look here nl <assistant>")
    assert chat.following([], stopped=True) == ids("nl <assistant>")
    assert chat.reply(ids("hello look <eos>")) == {"role": "assistant", "content": "hello look"}


def test_a_template_without_an_end_of_answer(make_chat, ids, plain) -> None:
    chat = make_chat(plain.replace("<eos>", ""))
    assert chat.following([{"role": "user", "content": "look"}], stopped=True) == ids("nl <user> look nl <assistant>")


def test_a_template_that_adds_to_the_last_answer_alone(make_chat, ids, plain) -> None:
    """As Qwen3's, which shows an empty reasoning before the last answer, and none before earlier ones."""
    template = plain.replace("{{ m.content }}", "{% if loop.last and m.role == 'assistant' %}here {% endif %}{{ m.content }}")
    assert make_chat(template).following([{"role": "user", "content": "look"}], stopped=True) == ids(
        "nl <user> look nl <assistant>"
    )


def test_a_template_that_hides_answers_is_refused(make_chat) -> None:
    with pytest.raises(ConfigError, match="does not show an assistant message's content as it is"):
        make_chat("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}")


def test_what_an_environment_says_of_answers_is_not_taken_for_one(make_chat, ids) -> None:
    message = {"role": "tool", "content": "An answer. here"}
    assert make_chat().following([message], stopped=True) == ids("nl <tool> An answer. here nl <assistant>")


def test_tools_are_shown(make_chat, ids, plain) -> None:
    template = "{% if tools %}{{ tools[0].function.name }} {% endif %}" + plain
    chat = make_chat(template)
    tool = {"type": "function", "function": {"name": "look"}}
    assert chat.prompt([{"role": "user", "content": "hello"}], tools=[tool]) == ids("look <user> hello nl <assistant>")


@pytest.mark.parametrize(
    ("text", "content", "functions"),
    [
        ("hello", "hello", None),
        (
            'x <tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>\n'
            '<tool_call>{"name": "g", "arguments": {}}</tool_call>',
            "x ",
            [("f", {"a": 1}), ("g", {})],
        ),
        ("<tool_call>f(1)</tool_call>", "", [("f(1)", {})]),  # of no tool: the environment says so
        ('<tool_call>{"name": "f", "arguments": {"a": 1}}', "", [("f", {"a": 1})]),  # whole, but for its end
        ('<tool_call>{"name": "f", "argu', "", [('{"name": "f", "argu', {})]),  # cut by a limit
        ('<tool_call>{"name": "f", "arguments": 5}</tool_call>', "", [('{"name": "f", "arguments": 5}', {})]),
    ],
)
def test_how_calls_are_read(text: str, content: str, functions: list | None) -> None:
    tokenizer = SimpleNamespace(
        apply_chat_template=lambda messages, **_: "".join(m["content"] for m in messages),
        encode=lambda text, **_: [1],
        decode=lambda ids, **_: text,
    )
    reply = Chat(tokenizer, (1,)).reply([5])
    assert reply["content"] == content
    if functions is None:
        assert "tool_calls" not in reply
    else:
        assert [(call["function"]["name"], call["function"]["arguments"]) for call in reply["tool_calls"]] == functions
        assert [call["id"] for call in reply["tool_calls"]] == [f"call_{i}" for i in range(len(functions))]
