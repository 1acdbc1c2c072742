import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from asyncrl.errors import ConfigError
from asyncrl.prompts.encoding import encoder, identity

TEMPLATE = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}{% if add_generation_prompt %}={% endif %}"


def tokenizer(template=TEMPLATE, letters="abc<>="):
    backend = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="a", chat_template=template)


def test_messages_go_through_the_template_with_the_turn_opened():
    encode = encoder(tokenizer())
    assert encode([{"role": "user", "content": "ab"}, {"role": "user", "content": "c"}]) == [3, 0, 1, 4, 3, 2, 4, 5]


def test_strings_are_tokenized_as_they_are():
    assert encoder(tokenizer())("ab=") == [0, 1, 5]
    assert encoder(tokenizer(template=None))("ab=") == [0, 1, 5]


def test_messages_without_a_template_are_refused():
    with pytest.raises(ConfigError, match="has no chat template, but the data holds chat messages"):
        encoder(tokenizer(template=None))([{"role": "user", "content": "a"}])


def test_identity_follows_vocabulary_and_template():
    assert identity(tokenizer()) == identity(tokenizer())
    assert len({identity(tokenizer()), identity(tokenizer(template="x")), identity(tokenizer(letters="cba<>="))}) == 3
