"""A process that only tokenizes does without torch, and tokenizes as one that has it."""

import json
import subprocess
import sys

import pytest

from asyncrl.config import ModelSpec
from asyncrl.errors import ConfigError
from asyncrl.models.tokenizing import load_tokenizer, stop_token_ids, tokenize_only
from asyncrl.prompts.encoding import encoder, identity

# Tokenizes what is said in its first argument by the tokenizer in its second.
WITHOUT_TORCH = """
import json, sys
from asyncrl.config import ModelSpec
from asyncrl.models.tokenizing import load_tokenizer, stop_token_ids, tokenize_only
from asyncrl.prompts.encoding import encoder, identity

text, spec = sys.argv[1], ModelSpec(path=sys.argv[2])
tokenize_only(spec)
tokenizer = load_tokenizer(spec)
ids = encoder(tokenizer)([{"role": "user", "content": text}])
decoded = tokenizer.decode(ids, skip_special_tokens=True)
assert not [name for name in sys.modules if name.startswith("torch.")]
print(json.dumps([ids, decoded, identity(tokenizer), stop_token_ids(tokenizer, spec)]))
"""


def test_without_torch_all_tokens_are_the_same(tiny_model):
    text, spec = "12+34=", ModelSpec(path=str(tiny_model))
    tokenizer = load_tokenizer(spec)
    ids = encoder(tokenizer)([{"role": "user", "content": text}])
    expected = [ids, tokenizer.decode(ids, skip_special_tokens=True), identity(tokenizer), [1]]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, text, str(tiny_model)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected
    assert done.stderr == "", "a warning that torch is missing"


def test_a_process_that_has_torch_keeps_it(tiny_model):
    import torch

    tokenize_only(ModelSpec(path=str(tiny_model)))
    assert sys.modules["torch"] is torch
    assert stop_token_ids(load_tokenizer(ModelSpec(path=str(tiny_model))), ModelSpec(path=str(tiny_model))) == (1,)


def test_code_that_comes_with_a_tokenizer_keeps_torch(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setenv("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    tokenize_only(ModelSpec(path="any", trust_remote_code=True))
    assert "torch" not in sys.modules
    tokenize_only(ModelSpec(path="any"))
    assert sys.modules["torch"] is None


def test_a_tokenizer_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=f"model.tokenizer='{tmp_path}': no tokenizer could be loaded"):
        load_tokenizer(ModelSpec(path=str(tmp_path)))
