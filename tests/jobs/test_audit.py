"""What may stand between the settings of `asyncrl audit`."""

from collections.abc import Callable

import pytest

from asyncrl.config import Recipe
from asyncrl.errors import ConfigError
from asyncrl.jobs.audit import parse_settings

GSPO, ICEPOP = "algorithm.policy_loss=gspo", "algorithm.masks=icepop"


@pytest.mark.parametrize(("words", "count"), [([], 0), ([GSPO], 1), ([GSPO, ICEPOP], 1), ([GSPO, "+", ICEPOP], 2)])
def test_a_plus_divides_settings(tiny_recipe: Callable[..., Recipe], words: list[str], count: int) -> None:
    assert len(parse_settings(tiny_recipe(), words)) == count


@pytest.mark.parametrize("words", [["+"], [GSPO, "+"], ["+", GSPO], [GSPO, "+", "+", ICEPOP]])
def test_a_plus_stands_between_two(tiny_recipe: Callable[..., Recipe], words: list[str]) -> None:
    with pytest.raises(ConfigError, match="stands between two settings; one of them is missing"):
        parse_settings(tiny_recipe(), words)
