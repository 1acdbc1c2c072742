"""docs/architectures.md is what docs/architectures.py finds out today: a few lines of it here, all of them by its command."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from asyncrl.models.architectures import PACKED, not_causal, not_served

QUICK = [
    "llama",
    "mistral",
    "gemma2",
    "gemma3_text",
    "gpt_oss",
    "llama4_text",
    "qwen2_moe",
    "gpt_neo",
    "bloom",
    "mamba",
    "lfm2",
]


@pytest.fixture(scope="module")
def architectures(root: Path, script: Callable[[Path], ModuleType]) -> ModuleType:
    return script(root / "docs" / "architectures.py")


@pytest.fixture(scope="module")
def lines(architectures: ModuleType) -> dict[str, str]:
    rows = architectures.PAGE.read_text().removeprefix(architectures.HEAD).splitlines()
    return {row.split("`")[1]: row for row in rows if row.startswith("|")}


@pytest.mark.parametrize("model_type", QUICK)
def test_the_page_says_what_is_so(architectures: ModuleType, lines: dict[str, str], model_type: str) -> None:
    assert lines[model_type] == architectures.row(model_type), "run `python docs/architectures.py`"


def test_the_page_is_of_this_list_and_this_text(architectures: ModuleType, lines: dict[str, str]) -> None:
    assert architectures.PAGE.read_text().startswith(architectures.HEAD), "run `python docs/architectures.py`"
    assert list(lines) == list(architectures.TRIED)
    assert not [line for line in lines.values() if "**" in line]  # nothing is listed that is off


def test_what_is_said_before_a_run_is_what_was_tried(architectures: ModuleType, lines: dict[str, str]) -> None:
    """A dry run knows the configuration alone: what was packed, and what was refused, it knows by name."""
    cells = {name: [cell.strip() for cell in line.split("|")] for name, line in lines.items()}
    assert {name for name in cells if cells[name][3] == "packed"} == PACKED & cells.keys()
    assert PACKED - cells.keys() == {"gpt-sw3"}  # GPT-2 by another name
    for name in cells:
        config = {"model_type": name}
        assert not not_causal(config)
        assert bool(not_served(config)) == (cells[name][4] != "yes"), name
        assert CONFIG_MAPPING[name].model_type == name
