"""Sentinels in a recipe: what is refused when it is made, and how the command line reaches them."""

import msgspec
import pytest

from asyncrl.config import Recipe, SentinelSpec, entropy_collapse, length_explosion, one_answer, reward_hacking
from asyncrl.config.load import override
from asyncrl.errors import ConfigError

READY = {"entropy": entropy_collapse(), "length": length_explosion(3.0, "stop"), "hack": reward_hacking(), "same": one_answer()}


@pytest.fixture
def recipe() -> Recipe:
    needed = {"name": "r", "model": {"path": "m"}, "data": {"files": ["f"]}, "reward": {"function": "m:f"}, "total_steps": 9}
    return msgspec.structs.replace(msgspec.convert(needed, Recipe), sentinels=READY)


def test_ready_ones_survive_the_recipe_that_is_saved(recipe: Recipe) -> None:
    assert msgspec.json.decode(msgspec.json.encode(recipe), type=Recipe).sentinels == READY
    assert {name: spec.then for name, spec in READY.items()} == {
        "entropy": "warn",
        "length": "stop",
        "hack": "warn",
        "same": "warn",
    }
    assert "3.0 * before" in READY["length"].when


def test_overrides_change_one_and_add_others(recipe: Recipe) -> None:
    changed = override(
        recipe, ["sentinels.entropy.then=stop", "sentinels.entropy.every=1", 'sentinels.lag.when="staleness/lag_mean" > 8']
    )
    assert changed.sentinels == READY | {
        "entropy": msgspec.structs.replace(READY["entropy"], then="stop", every=1),
        "lag": SentinelSpec(when='"staleness/lag_mean" > 8'),
    }
    assert override(recipe, ["sentinels={}"]).sentinels == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sentinels.entrpy.then=stop", r"sentinels\.entrpy has no 'when', which it needs; .*: entropy, hack, length, same"),
        ("sentinels.entropy.thn=stop", r"sentinels\.entropy has no field 'thn'; did you mean 'then'\?"),
        ("sentinels.entropy.then=end", r"sentinels\.entropy\.then must be one of 'warn', 'checkpoint', 'stop', not 'end'"),
        ("sentinels.entropy.patience=0", r"patience=0 < 1: it would never be looked at"),
        ("sentinels.entropy.when= ;", r"when=' ;' is no condition"),
        ("sentinels.entropy=null", r"sentinels\.entropy is a group; set one of its fields: when, then"),
        ("sentinels={a b: {when: x}}", r"sentinels: \['a b'\] could not be overridden"),
    ],
)
def test_what_is_wrong_is_named(recipe: Recipe, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        override(recipe, [text])


def test_a_consequence_that_there_is_not_is_refused_where_it_is_written() -> None:
    with pytest.raises(ConfigError, match=r"then='halt' can't be done; use warn, checkpoint or stop"):
        SentinelSpec(when="true", then="halt")
