"""Chat messages as token ids: what was sampled stays, and what is between answers is the template's."""

from types import SimpleNamespace

import pytest

from asyncrl.episodes.chat import UNREADABLE, TemplateChat, Turn
from asyncrl.errors import ConfigError


def after(chat: TemplateChat, *messages: dict, stopped: bool = True) -> list[int]:
    """What stands between an answer and the next."""
    return chat.next_prompt(Turn((), (), stopped), messages)


def test_a_conversation_is_what_was_read_and_sampled(make_chat, ids) -> None:
    chat = make_chat()
    assert chat.prompt([{"role": "user", "content": "hello"}]) == ids("<user> hello nl <assistant>")
    message = {"role": "tool", "content": "look here"}
    assert after(chat, message) == ids("nl <tool> look here nl <assistant>")
    assert after(chat, message, stopped=False) == ids("<eos> nl <tool> look here nl <assistant>")
    assert after(chat) == ids("nl <assistant>")
    turn = Turn(ids("<user> <pad>"), ids("hello look <eos>"), stopped=True)
    assert chat.next_prompt(turn, []) == ids("<user> <pad> hello look <eos> nl <assistant>")
    assert chat.reply(turn) == {"role": "assistant", "content": "hello look"}


def test_a_template_without_an_end_of_answer(make_chat, ids, plain) -> None:
    chat = make_chat(plain.replace("<eos>", ""))
    assert after(chat, {"role": "user", "content": "look"}) == ids("nl <user> look nl <assistant>")


def test_a_template_that_adds_to_the_last_answer_alone(make_chat, ids, plain) -> None:
    """As Qwen3's, which shows an empty reasoning before the last answer, and none before earlier ones."""
    template = plain.replace("{{ m.content }}", "{% if loop.last and m.role == 'assistant' %}here {% endif %}{{ m.content }}")
    assert after(make_chat(template), {"role": "user", "content": "look"}) == ids("nl <user> look nl <assistant>")


def test_a_template_that_hides_answers_is_refused(make_chat) -> None:
    with pytest.raises(ConfigError, match="does not show an assistant message's content as it is"):
        make_chat("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}")


def test_what_an_environment_says_of_answers_is_not_taken_for_one(make_chat, ids) -> None:
    message = {"role": "tool", "content": "An answer. here"}
    assert after(make_chat(), message) == ids("nl <tool> An answer. here nl <assistant>")


def test_tools_are_shown(make_chat, ids, plain) -> None:
    template = "{% if tools %}{{ tools[0].function.name }} {% endif %}" + plain
    chat = make_chat(template)
    tool = {"type": "function", "function": {"name": "look"}}
    assert chat.prompt([{"role": "user", "content": "hello"}], tools=[tool]) == ids("look <user> hello nl <assistant>")


def says(text: str, template: str = "", prompt: str = "") -> TemplateChat:
    """Of a tokenizer to which everything is this text, but for a prompt's token 4."""
    return TemplateChat(
        SimpleNamespace(
            apply_chat_template=lambda messages, **_: "".join(m["content"] for m in messages),
            encode=lambda text, **_: [1],
            decode=lambda ids, **_: prompt if ids == [4] else text,
            chat_template=template,
        ),
        (1,),
    )


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
        ("<tool_call>f(1)</tool_call>", "", [(UNREADABLE, "f(1)")]),  # whoever would do it says so
        ('<tool_call>{"name": "f", "arguments": {"a": 1}}', "", [("f", {"a": 1})]),  # whole, but for its end
        ('<tool_call>{"name": "f", "argu', "", [("f", '{"name": "f", "argu')]),  # cut by a limit
        ('<tool_call>{"name": "f", "arguments": 5}</tool_call>', "", [("f", '{"name": "f", "arguments": 5}')]),
    ],
)
def test_how_calls_are_read(text: str, content: str, functions: list | None) -> None:
    reply = says(text).reply(Turn([4], [5], stopped=True))
    assert reply["content"] == content
    if functions is None:
        assert "tool_calls" not in reply
    else:
        assert [(call["function"]["name"], call["function"]["arguments"]) for call in reply["tool_calls"]] == functions
        assert [call["id"] for call in reply["tool_calls"]] == [f"call_{i}" for i in range(len(functions))]


@pytest.mark.parametrize(
    ("prompt", "text", "reasoning", "content", "calls"),
    [
        ("", "<think>\nHm.\n</think>\n\nhello", "Hm.", "hello", 0),
        ("<assistant>\n<think>\n", "Hm.\n</think>\n\nhello", "Hm.", "hello", 0),  # the template has opened it
        ("<assistant>", "hello </think>", None, "hello </think>", 0),
        ("", "<think>Hm.", "Hm.", "", 0),  # cut by a limit: all of it is reasoning
        ("", '<think><tool_call>{"name": "f", "arguments": {}}</tool_call></think>hello', None, "hello", 0),  # a draft
        ("", '<think>Hm.</think><tool_call>{"name": "f", "arguments": {}}</tool_call>', "Hm.", "", 1),
    ],
)
def test_reasoning_is_told_from_what_is_said(prompt: str, text: str, reasoning: str | None, content: str, calls: int) -> None:
    chat = says(text, "{{ '</think>' }}", prompt)
    reply = chat.reply(Turn([4], [5], stopped=True))
    assert (reply["content"], len(reply.get("tool_calls", ()))) == (content, calls)
    assert reasoning is None or reply["reasoning_content"] == reasoning
    assert "reasoning_content" not in says(text, prompt=prompt).reply(Turn([4], [5], stopped=True))  # a template without


SHOWN = "{% for m in messages %}{{ m.role }} {{ m.content }} nl {% endfor %}"
THINKING = (
    "{% for m in messages %}{% if loop.last and m.reasoning_content %}{{ m.reasoning_content }} {% endif %}"
    "{{ m.content }} {% endfor %}"
)
HERMES = (
    "{% for m in messages %}{{ m.content }} {% for call in m.tool_calls or [] %}<tool_call>"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</tool_call>{% endfor %}'
    "{% endfor %}"
)
LLAMA = HERMES.replace("<tool_call>", "").replace("</tool_call>", "")


@pytest.mark.parametrize(("template", "told"), [(SHOWN, False), (THINKING, True)])
def test_a_template_that_shows_earlier_answers_otherwise_is_told_of(make_chat, template: str, told: bool, caplog) -> None:
    caplog.set_level("INFO")
    make_chat(template)
    assert ("shows earlier answers otherwise" in caplog.text) == told


@pytest.mark.parametrize(("template", "told"), [(HERMES, False), (LLAMA, True), (SHOWN, False)])
def test_a_template_whose_calls_are_not_read_is_told_of(make_chat, template: str, told: bool, caplog) -> None:
    make_chat(template)
    assert ("set episode.chat to the model's family" in caplog.text) == told
