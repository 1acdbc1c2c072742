"""Which groups a report shows, and their tokens as texts."""

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models

from asyncrl.jobs.picking import picked_groups, token_pieces
from asyncrl.replay.log.digest import RunDigest


def digest(rewards: list[list[float]], untrained: int = 0) -> RunDigest:
    """Group g has these rewards; group g is trained by update g + 1, but for the last ones."""
    groups = np.repeat(np.arange(len(rewards)), [len(own) for own in rewards])
    trained = np.arange(len(rewards) - untrained)
    return RunDigest(
        scored_groups=groups,
        rewards=np.array([r for own in rewards for r in own]),
        trained_groups=trained,
        trained_by=trained + 1,
    )


def test_every_reason_has_its_groups() -> None:
    rewards = [[0.5, 0.5]] * 100
    rewards[40], rewards[41], rewards[42] = [1.0, 1.0], [0.0, 0.0], [0.0, 1.0]
    run = digest(rewards, untrained=10)
    run.bad_groups = np.array([95])
    found = picked_groups(run)
    assert {group: found[group] for group in (89, 40, 41, 42, 95, 82)} == {
        89: "newest", 40: "highest reward", 41: "lowest reward", 42: "widest spread", 95: "failed", 82: "newest"
    }  # fmt: skip
    assert not {90, 91, 99} & found.keys()  # not trained yet
    spread = sorted(found)
    assert spread[0] == 0
    assert max(np.diff(spread)) <= 6  # 16 over 90
    assert len(found) <= 8 + 16 + 4 * 6


def test_nothing_to_pick() -> None:
    assert picked_groups(RunDigest()) == {}


def test_tokens_as_texts(tmp_path: Path) -> None:
    """Blanks stand where the decoder puts them: between words, not before the first."""
    vocabulary = Tokenizer(models.WordLevel({"▁one": 0, "▁two": 1, "s": 2}, unk_token="s"))
    vocabulary.decoder = decoders.Metaspace()
    vocabulary.save(str(tmp_path / "tokenizer.json"))
    pieces = token_pieces({"path": str(tmp_path)})
    assert pieces is not None
    assert pieces([0, 2, 1, 1]) == ["one", "s", " two", " two"]
    assert pieces([]) == []
    assert token_pieces({"path": "nobody/has-this-model"}) is None
    assert token_pieces({"path": str(tmp_path / "not there")}) is None
