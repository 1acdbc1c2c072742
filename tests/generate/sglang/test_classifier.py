"""A real SGLang server as a reward model: the scores of the torch model, until it dies."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForSequenceClassification

from asyncrl.config import EngineSpec, GeneratorsSpec, LimitsSpec, ModelSpec, SGLangSpec
from asyncrl.errors import Unavailable
from asyncrl.generate.engines import EngineSite
from asyncrl.generate.sglang.classifier import SGLangClassifier
from asyncrl.models.classifier import load_classifier, logits_of

pytestmark = pytest.mark.server


def until(limit_s: float) -> Iterator[None]:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        yield


def test_it_scores_as_the_torch_model_does_and_its_death_is_noticed(sglang_on_cpu: None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 32, "initializer_range": 0.08}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen3Config(vocab_size=512, num_labels=1, pad_token_id=0, max_position_embeddings=4096, **sizes, **heads)
    Qwen3ForSequenceClassification(config).save_pretrained(tmp_path)
    spec, args = (
        ModelSpec(path=str(tmp_path)),
        {"max-total-tokens": 8192, "mem-fraction-static": 0.3, "skip-server-warmup": True},
    )
    engine = EngineSpec(kind="sglang", sglang=SGLangSpec(command=("sglang-cpu-server",), args=args))
    limits = LimitsSpec(start_timeout_s=150.0)
    site = EngineSite(generators=GeneratorsSpec(engine=engine), model=spec, limits=limits, name="model-0.0", logs=tmp_path)
    server = SGLangClassifier(site)
    try:
        sequences = [torch.randint(1, 512, (length,)).tolist() for length in (3, 40, 1, 200, 17)]
        expected = logits_of(load_classifier(spec), 0)(sequences)
        assert server(sequences) == pytest.approx(expected, abs=1e-4)
        assert max(expected) - min(expected) > 0.1
        server.health()
        os.kill(server._server.pids()[-1], signal.SIGKILL)
        with pytest.raises(Unavailable, match="died"):
            [server.health() for _ in until(20)]
    finally:
        server.close()
