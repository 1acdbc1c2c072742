"""What a configuration tells; that it is told right of each architecture, tests/docs/test_architectures.py shows."""

from pathlib import Path

import huggingface_hub.constants
import pytest

from asyncrl.models.architectures import follows_length, named, not_causal, not_served, read_config


def test_the_configuration_of_an_id_is_that_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("abc")
    (repository / "snapshots/abc").mkdir(parents=True)
    (repository / "snapshots/abc/config.json").write_text('{"model_type": "mamba"}')
    assert read_config("someone/tiny") == {"model_type": "mamba"}
    assert read_config("someone/else") == read_config("/nowhere/at/all") == read_config("neither folder nor id") == {}


@pytest.mark.parametrize(
    ("rope", "follows"),
    [
        ({}, False),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, False),
        ({"rope_scaling": None}, False),
        ({"rope_scaling": {"type": "su"}}, True),  # LongRoPE's name in the first models of Phi-3
        ({"text_config": {"rope_scaling": {"rope_type": "dynamic"}}}, True),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "longrope"}, "sliding_attention": {"rope_type": "default"}}},
            True,
        ),
    ],
)
def test_positions_that_follow_the_length(rope: dict, follows: bool) -> None:
    assert follows_length(rope) == follows


@pytest.mark.parametrize("where", [{}, {"text_config": {}}], ids=["text alone", "wrapped"])
def test_attention_in_both_directions_is_no_causal_model(where: dict) -> None:
    text = {"model_type": "gemma3_text", "use_bidirectional_attention": True}
    assert "use_bidirectional_attention" in not_causal({"text_config": text} if where else text)
    assert not not_causal(text | {"use_bidirectional_attention": False})


def test_an_encoder_made_a_decoder_is_one_and_served_elsewhere() -> None:
    config = {"model_type": "bert", "is_decoder": True}
    assert not not_causal(config)
    assert "kind=sglang" in not_served(config)


def test_nothing_is_said_against_what_is_not_known() -> None:
    assert not_causal({}) == not_served({}) == ""
    assert named({}) == "unknown"
