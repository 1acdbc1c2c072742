"""Which tokens of a demonstration are learned: by hand, one token per character."""

import json

import jinja2
import pytest

from asyncrl.config import DemonstrationsSpec
from asyncrl.errors import ConfigError, DataError
from asyncrl.prompts.demonstrations import check_demonstrations, read_demonstrations

CHAT = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}|{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
BARE = CHAT.replace("}|{", "}{")  # no token ends a turn
# as Qwen3's: earlier answers lose what only the last one has
UNSTABLE = CHAT.replace("{{ m.content }}", "{{ '#' if loop.last and m.role == 'assistant' }}{{ m.content }}")


class Characters:
    """One token per character; `|` ends a turn; plain texts begin with `^`."""

    eos_token_id = ord("|")
    name_or_path = "characters"

    def __init__(self, template: str | None = CHAT) -> None:
        self.chat_template = template
        self._compiled = jinja2.Template(template or "")

    def apply_chat_template(self, messages, add_generation_prompt, tokenize):
        assert not tokenize
        return self._compiled.render(messages=messages, add_generation_prompt=add_generation_prompt)

    def __call__(self, texts, add_special_tokens, return_attention_mask):
        return {"input_ids": [[ord(c) for c in ("^" if add_special_tokens else "") + text] for text in texts]}


@pytest.fixture
def read(tmp_path):
    def read(rows, tokenizer=None, stop_ids=(), max_length=100, **keys):
        path = tmp_path / "demos.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        spec = DemonstrationsSpec(files=(str(path),), **keys)
        check_demonstrations(spec.files, spec)
        return read_demonstrations(spec.files, spec, tokenizer or Characters(), stop_ids, max_length)

    return read


def shown(examples):
    """Each example as text, what is learned of it in brackets."""
    texts = []
    for ids, learned in examples:
        text = "".join(f"[{chr(token)}]" if i in learned.tolist() else chr(token) for i, token in enumerate(ids.tolist()))
        texts.append(text.replace("][", ""))
    return texts


def turns(*contents, first="user"):
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def test_a_response_is_learned_with_its_stop_token(read):
    rows = [{"prompt": turns("2+2"), "response": "4"}, {"prompt": "say b:", "response": "b"}, {"prompt": "x", "response": "y|"}]
    assert shown(read(rows).examples) == ["u:2+2|a:[4|]", "^say b:[b|]", "^x[y|]"]


def test_dotted_keys(read):
    rows = [{"q": {"text": "x"}, "extra_info": {"answer": "y"}}]
    assert shown(read(rows, prompt_key="q.text", response_key="extra_info.answer").examples) == ["^x[y|]"]


def test_of_a_conversation_every_answer_is_learned_and_nothing_else(read):
    system = {"role": "system", "content": "S"}
    rows = [{"chat": [system, *turns("p", "q", "r", "st", "thanks")]}, {"chat": turns("hi", "p", "q", first="assistant")}]
    # what comes after the last answer is of no use, and is not even computed
    assert shown(read(rows, messages_key="chat").examples) == ["s:S|u:p|a:[q|]u:r|a:[st|]", "a:[hi|]u:p|a:[q|]"]


def test_a_template_without_stop_tokens_gets_one_at_the_end(read):
    rows = [{"m": turns("p", "q", "r", "s")}]
    assert shown(read(rows, Characters(BARE), messages_key="m").examples) == ["u:pa:[q]u:ra:[s|]"]


def test_learned_up_to_the_first_of_several_stop_tokens(read):
    assert shown(read([{"prompt": "x", "response": "y!z"}], stop_ids=(ord("!"), ord("|"))).examples) == ["^x[y!]"]


def test_too_long_is_left_out_and_counted(read):
    rows = [{"prompt": "x", "response": "y" * length} for length in (1, 3, 2, 9)]
    found = read(rows, max_length=5)  # ^x, the response and its stop token
    assert shown(found.examples) == ["^x[y|]", "^x[yy|]"]
    assert found.too_long == 2
    with pytest.raises(
        DataError, match=r"all 4 examples are longer than 3 tokens \(the shortest has 4\).*raise data.max_length"
    ):
        read(rows, max_length=3)


def test_many_rows_stay_in_order(read):
    rows = [{"prompt": turns("p") if i % 2 else "p", "response": str(i)} for i in range(2100)]  # in three chunks
    assert shown(read(rows).examples[-2:]) == ["^p[2098|]", "u:p|a:[2099|]"]


@pytest.mark.parametrize(
    ("row", "keys", "message"),
    [
        (
            {"prompt": "x", "answer": "y"},
            {},
            r"line 2: no column 'response' \(data.response_key='response'\); columns found: answer, ",
        ),
        ({"prompt": "x", "respons": "y"}, {}, r"did you mean 'respons'\?"),
        (
            {"prompt": "x", "response": ""},
            {},
            r"line 2: 'response' \(data.response_key\) is an empty str; expected a non-empty",
        ),
        ({"prompt": "x", "response": 4}, {}, r"is int '4'; .*whole conversations: name their column in data.messages_key"),
        ({"prompt": [], "response": "y"}, {}, r"line 2: 'prompt' \(data.prompt_key\) is an empty list"),
        ({"m": "x"}, {"messages_key": "m"}, r"line 2: 'm' \(data.messages_key\) is str 'x'; expected a list of chat messages"),
        (
            {"m": turns("x")},
            {"messages_key": "m"},
            r"no turn of role 'assistant' with content \(roles: user\): nothing to learn",
        ),
        ({"n": turns("x")}, {"messages_key": "m"}, r"no column 'm' \(data.messages_key='m'\)"),
    ],
)
def test_a_bad_row_is_named(read, row, keys, message):
    good = {"prompt": "x", "response": "y", "m": turns("p", "q")}
    with pytest.raises(DataError, match=message):
        read([good, row], **keys)


def test_a_template_that_rewrites_earlier_turns_is_refused(read):
    rows = [{"m": turns("p", "q")}, {"m": turns("p", "q", "r", "s")}]
    assert shown(read(rows[:1], Characters(UNSTABLE), messages_key="m").examples) == ["u:p|a:[#q|]"]
    with pytest.raises(
        DataError, match=r"line 2: the chat template writes what comes before message 3 differently .* one row per"
    ):
        read(rows, Characters(UNSTABLE), messages_key="m")


def test_what_a_template_refuses_is_named(read):
    tokenizer = Characters("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match=r"line 1: the tokenizer's chat template refuses these messages: .*raise_exception"):
        read([{"prompt": turns("x"), "response": "y"}], tokenizer)
    with pytest.raises(ConfigError, match="has no chat template"):
        read([{"prompt": turns("x"), "response": "y"}], Characters(None))


def test_an_empty_prompt_and_a_missing_stop_token(read):
    tokenizer = Characters("{{ '' }}")
    with pytest.raises(DataError, match="line 1: the prompt has no tokens"):
        read([{"prompt": turns("x"), "response": "y"}], tokenizer)
    tokenizer.eos_token_id = None
    with pytest.raises(ConfigError, match="no response would learn to end"):
        read([{"prompt": "x", "response": "y"}], tokenizer)
    assert shown(read([{"prompt": "x", "response": "y"}], tokenizer, stop_ids=(ord("."),)).examples) == ["^x[y.]"]


def test_a_file_without_rows(read):
    with pytest.raises(DataError, match="holds no rows"):
        read([])
