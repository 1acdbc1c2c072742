"""docs/reference.md is what docs/reference.py makes of the structs today."""

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from asyncrl.config import CriticSpec, LearnerSpec, SFTSpec


@pytest.fixture(scope="module")
def reference(root: Path, script: Callable[[Path], ModuleType]) -> ModuleType:
    return script(root / "docs" / "reference.py")


def test_the_page_is_up_to_date(reference):
    assert reference.main(["--check"]) == 0, "run `python docs/reference.py`"


def test_a_stale_page_is_noticed_and_not_written(reference, tmp_path, monkeypatch, capsys):
    stale = tmp_path / "reference.md"
    stale.write_text("something else")
    monkeypatch.setattr(reference, "PAGE", stale)
    assert reference.main(["--check"]) == 1
    assert "python docs/reference.py" in capsys.readouterr().err
    assert stale.read_text() == "something else"


def test_inherited_fields_have_the_defaults_of_the_subclass(reference):
    rates = {struct: {f.name: f.default for f in reference.fields(struct, "")} for struct in (LearnerSpec, CriticSpec, SFTSpec)}
    assert [rates[struct]["lr"] for struct in (LearnerSpec, CriticSpec, SFTSpec)] == ["`1e-06`", "`1e-05`", "`1e-05`"]
    assert [rates[struct]["betas"] for struct in (LearnerSpec, SFTSpec)] == ["`[0.9, 0.999]`"] * 2
    assert rates[SFTSpec]["out"] is None  # required


def test_meanings_are_the_comments_at_the_fields(reference, tmp_path, monkeypatch):
    (tmp_path / "asyncrl_example.py").write_text(
        "import msgspec\n"
        "class Base(msgspec.Struct, frozen=True, kw_only=True):\n"
        "    # Above the field,\n"
        "    # in two lines.\n"
        "    a: int\n"
        "    b: str = '# none'  # Behind it.\n"
        "    c: int = 0\n\n"
        "    # ------------------ a heading\n\n"
        "    d: int = 1\n"
        "class Sub(Base, frozen=True, kw_only=True):\n"
        "    b: str = 'x'\n"
        "    c: int = 2  # Its own.\n"
        "    e: tuple[\n        int, ...\n    ] = ()  # Behind the last line.\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    example = importlib.import_module("asyncrl_example")
    for cls in (example.Base, example.Sub):
        monkeypatch.setattr(cls, "__module__", "asyncrl_example")
    monkeypatch.setattr(reference, "PACKAGE", "asyncrl_example")
    said = "Above the field, in two lines."
    assert reference.meanings(example.Base) == {"a": said, "b": "Behind it."}
    assert reference.meanings(example.Sub) == {"a": said, "b": "Behind it.", "c": "Its own.", "e": "Behind the last line."}


def test_every_field_has_a_meaning(reference):
    silent = [
        field.name
        for _, root, prefix, _ in reference.ROOTS
        for struct, paths in reference.structs(root, prefix).items()
        for field in reference.fields(struct, paths[0])
        if not field.meaning
    ]
    assert silent == []
