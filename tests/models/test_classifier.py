"""Reward models as TRL asks them: what is read, where the score is taken, and what is refused."""

import shutil

import pytest
import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForSequenceClassification

from asyncrl.config import ModelSpec
from asyncrl.errors import ConfigError
from asyncrl.models.architectures import not_a_classifier, read_config
from asyncrl.models.classifier import chat_encoder, load_classifier, logits_of, padding_of
from asyncrl.models.hub import frozen_folder

CHAT = [{"role": "user", "content": "1+2"}, {"role": "assistant", "content": "3"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, arithmetic):
    """A random Qwen3 classifier with one label, and a character tokenizer."""
    path = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8, "initializer_range": 0.3}
    config = Qwen3Config(
        vocab_size=17,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_labels=1,
        pad_token_id=0,
        **sizes,
    )
    Qwen3ForSequenceClassification(config).save_pretrained(path)
    arithmetic.make_tokenizer().save_pretrained(path)
    return path


def test_scores_are_those_of_the_model_alone_whatever_stands_beside_in_the_pack(folder):
    model = load_classifier(ModelSpec(path=str(folder)))
    logits = logits_of(model, 0)
    sequences = [[2, 4, 5], [2, 4, 5, 6, 7, 8, 3], [9]]
    with torch.no_grad():
        alone = [model(input_ids=torch.tensor([ids])).logits[0, 0].item() for ids in sequences]
    assert logits(sequences) == pytest.approx(alone, abs=1e-5)
    assert max(alone) - min(alone) > 0.1


def test_messages_are_written_once_and_texts_as_they_are(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encode = chat_encoder(tokenizer)
    assert encode(CHAT) == tokenizer.apply_chat_template(CHAT, return_dict=False)
    assert tokenizer.decode(encode("1+2=3")) == "1+2=3"


def test_a_bos_that_the_template_writes_is_not_doubled(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 1)])
    tokenizer.chat_template = "<eos>" + tokenizer.chat_template
    assert tokenizer("1")["input_ids"][0] == 1  # it adds one by itself
    assert chat_encoder(tokenizer)(CHAT).count(1) == 1


def test_a_template_that_refuses_or_drops_what_a_tool_said_scores_nothing(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    told = [CHAT[0], {"role": "tool", "content": "12"}, CHAT[1]]
    tokenizer.chat_template = "{% for m in messages if m.role != 'tool' %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="leaves out what a tool said: '12'"):
        chat_encoder(tokenizer)(told)
    assert chat_encoder(tokenizer)(CHAT)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="refuses the conversation: roles must alternate"):
        chat_encoder(tokenizer)(CHAT)
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="no chat template"):
        chat_encoder(tokenizer)(CHAT)


def test_a_causal_model_several_labels_or_no_padding_are_refused(folder, tiny_model, tmp_path):
    assert not_a_classifier(read_config(str(folder))) == ""
    assert not_a_classifier(read_config(str(tiny_model))).startswith("is a Qwen3ForCausalLM: the head that scores would be")
    with pytest.raises(ConfigError, match=r"1 weights, e.g. \['score.weight'\], are not in its files"):
        load_classifier(ModelSpec(path=str(tiny_model)))
    with pytest.raises(ConfigError, match="no sequence classifier could be loaded"):
        load_classifier(ModelSpec(path=str(tmp_path)))
    two = Qwen3Config(architectures=["Qwen3ForSequenceClassification"], num_labels=2).to_dict()
    assert not_a_classifier(two).startswith("has num_labels=2: which")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert padding_of(tokenizer, ModelSpec(path="m")) == 0
    tokenizer.pad_token = None
    with pytest.raises(ConfigError, match="no padding token"):
        padding_of(tokenizer, ModelSpec(path="m"))


def test_the_digest_is_that_of_the_weights(folder, tmp_path):
    same, other = tmp_path / "same", tmp_path / "other"
    shutil.copytree(folder, same)
    shutil.copytree(folder, other)
    (same / "config.json").touch()
    weights = other / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert frozen_folder(str(folder))[1] == frozen_folder(str(same))[1] != frozen_folder(str(other))[1]
