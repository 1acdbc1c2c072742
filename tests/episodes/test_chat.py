"""Chat messages as token ids: what was sampled stays, and what is between answers is the template's."""

import pytest

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
