"""What tests of the documentation look at: every page, and the code blocks in it."""

import re
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


class Block(NamedTuple):
    """A fenced block: its language, and its text."""

    page: str
    language: str
    text: str


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def pages() -> dict[str, str]:
    """Text of every page by its path from the root."""
    return {str(page.relative_to(ROOT)): page.read_text() for page in PAGES}


@pytest.fixture(scope="session")
def blocks(pages: dict[str, str]) -> list[Block]:
    fence = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
    return [Block(name, *found.groups()) for name, text in pages.items() for found in fence.finditer(text)]
