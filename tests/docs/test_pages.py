"""What the documentation names exists, and what it shows works."""

import argparse
import ast
import csv
import importlib
import re
import shlex
from pathlib import Path

import msgspec
import pytest
import yaml

import asyncrl.config
import asyncrl.interfaces
from asyncrl.cli import JOBS
from asyncrl.config import Deployment, Recipe, SFTSpec
from asyncrl.config.callables import check_callable
from asyncrl.config.load import load_deployment, load_recipe, override
from asyncrl.config.names import TABLE

GENERATED = "docs/reference.md"
HISTORY = "CHANGELOG.md"  # names what is no more
FILES = (".py", ".json", ".jsonl", ".yaml")


def test_readme_is_short(pages):
    assert len(pages["README.md"].splitlines()) <= 200


# ------------------------------------------------------------------------------------------------ links


def anchors(text: str) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_resolve(pages, root):
    broken = []
    for page, text in pages.items():
        for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", text)):
            if target.startswith("https://"):
                continue
            name, _, anchor = target.partition("#")
            file = (root / page).parent / name if name else root / page
            if not file.exists() or (anchor and anchor not in anchors(file.read_text())):
                broken.append(f"{page}: {target}")
    assert broken == []


def test_every_page_is_in_the_index(pages):
    index = pages["docs/README.md"]
    assert [page for page in pages if page.startswith("docs/") and f"({page[5:]})" not in index] == ["docs/README.md"]


# ---------------------------------------------------------------------------------------------- commands


def commands(text: str) -> list[list[str]]:
    """Every `asyncrl JOB …` in indented lines and in backticks, comments left out."""
    lines = re.findall(r"^ {4,}(\S.*)$", text, re.M) + re.findall(r"`([^`\n]+)`", text)
    found = (re.search(r"(?:^|&& |-- )asyncrl ([a-z]+ .+)", line) for line in lines)
    return [shlex.split(match[1], comments=True) for match in found if match and "…" not in match[1]]


def test_commands_are_known(pages, root):
    seen = 0
    for page, text in pages.items():
        for job, *rest in commands(text):
            parser = argparse.ArgumentParser(prog=f"{page}: asyncrl {job}")
            module, _, function = JOBS[job][0].partition(":")
            getattr(importlib.import_module(module), function or "add_arguments")(parser)
            args = parser.parse_intermixed_args(rest)  # exits where a flag is unknown
            overrides = [word for word in getattr(args, "overrides", []) if not word.isdecimal()]  # the number is of --resume
            if job == "run":
                _override_specs(root / args.recipe, root / (args.deploy or ""), overrides)
            elif job == "sft":
                spec = msgspec.convert({"model": {"path": "m"}, "data": {"files": ["f"]}, "out": "o"}, SFTSpec)
                override(spec, overrides)
            seen += 1
    assert seen > 30


def _override_specs(recipe: Path, deploy: Path, overrides: list[str]) -> None:
    """Applies them to the files that are named, or to the smallest recipe and the defaults where these are the reader's."""
    made = load_recipe(recipe) if recipe.is_file() else _recipe()
    override(made, [text for text in overrides if not text.startswith("deploy.")])
    deployment = load_deployment(deploy) if deploy.is_file() else Deployment()
    override(deployment, [text for text in overrides if text.startswith("deploy.")], "deploy.")


def _recipe() -> Recipe:
    needed = {"name": "r", "model": {"path": "m"}, "data": {"files": ["f"]}, "reward": {"function": "m:f"}, "total_steps": 99}
    return msgspec.convert(needed | {"sentinels": {"entropy": {"when": "true"}}}, Recipe)


# ------------------------------------------------------------------------------------------------ names


def _inline(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S))


def test_files_exist(pages, root):
    ours = re.compile(r"(?:asyncrl|tests|recipes|deploy|docs|\.ci)/[\w./-]*")
    missing = []
    for page, text in pages.items():
        found = set(ours.findall(" ".join(_inline(text)))) | set(re.findall(r"(?:recipes|deploy|tests)/[\w./-]+", text))
        missing += [f"{page}: {name}" for name in found if page != HISTORY and not (root / name).exists()]
    assert missing == []


def test_dotted_names_import(pages):
    """`asyncrl.a.b:c` is a function; `asyncrl.a.b` a module or something in it. By the source alone: nothing is imported."""
    for page, text in pages.items():
        for name in re.findall(r"`(asyncrl(?:\.\w+)+(?::\w+)?)`", text):
            if page == HISTORY:
                continue
            if ":" in name or importlib.util.find_spec(name) is None:
                check_callable(name, page)


def test_functions_stand_in_the_files_that_tables_name(pages, root):
    """Rows such as | 1 | `Class.method` | `asyncrl/file.py` |: the function is defined there."""
    rows = re.findall(r"\| `([\w.]+)` \| `(asyncrl/[\w/]+\.py)` \|", "\n".join(pages.values()))
    assert len(rows) >= 20
    for name, file in rows:
        body: list[ast.stmt] = ast.parse((root / file).read_text()).body
        for part in name.split("."):
            found = [node for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)]
            near = [node for node in found if node.name == part]
            assert near, f"{name} is not in {file}"
            body = near[0].body


def test_fields_exist(pages):
    """`learner.lr`, `algorithm.kl_in=reward`, `deploy.limits.lease_s`: a field of a recipe, a deployment or a warm start."""
    leaves = {path for root in (Recipe, Deployment, SFTSpec) for path in _paths(root)}
    first = {path.partition(".")[0] for path in leaves}
    unknown = []
    for page, text in pages.items():
        if page in (GENERATED, HISTORY, "docs/comparison.md"):  # the comparison names fields of others too
            continue
        for name in re.findall(r"`(?:deploy\.)?([a-z_]+(?:\.[a-z0-9_]+)+)(?:=[^`]*)?`", text):
            if name.partition(".")[0] in first and name not in leaves and not name.endswith(FILES):
                unknown.append(f"{page}: {name}")
    assert unknown == []


def test_the_names_of_verl_and_trl_are_those_that_overrides_are_answered_with(pages):
    """Every row of names.csv is one of the page's table, and the other way round; each names fields that there are."""

    def ticked(names: str) -> str:
        return ", ".join(f"`{name}`" for name in names.split())

    table = pages["docs/comparison.md"].partition("| verl | TRL | asyncrl |\n|---|---|---|\n")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    plain = [(verl, trl, re.sub("`|,(?= `)", "", ours)) for verl, trl, ours in rows]
    with TABLE.open() as file:
        assert plain == [(ticked(verl), ticked(trl), ours) for verl, trl, ours in list(csv.reader(file))[1:]]
    leaves = {path for root, prefix in ((Recipe, ""), (Deployment, "deploy.")) for path in _paths(root, prefix)}
    for _, _, ours in rows:
        named = re.findall(r"`([\w.]+)(?:=[^`]*)?`", ours)
        assert [name for name in named if name not in leaves and "." in name] == []
    assert len(rows) > 30


def _paths(struct: type[msgspec.Struct], prefix: str = "") -> list[str]:
    found = []
    for field in msgspec.structs.fields(struct):
        found.append(prefix + field.name)
        for part in (field.type, *getattr(field.type, "__args__", ())):
            if isinstance(part, type) and issubclass(part, msgspec.Struct):
                found += _paths(part, f"{prefix}{field.name}.")
    return found


# ----------------------------------------------------------------------------------------------- blocks


def test_python_blocks_compile_and_specs_construct(blocks):
    """What constructs a spec is run, so that a field or a name that is no more is found."""
    made = 0
    for block in (block for block in blocks if block.language == "python"):
        code = compile(block.text, block.page, "exec")
        if "from asyncrl.config import" in block.text and block.page != "docs/composing.md":  # test_compose runs that
            names: dict[str, object] = {}
            exec(code, names)
            made += sum(isinstance(value, msgspec.Struct) for value in names.values())
    assert made >= 3


def test_yaml_blocks_are_deployments(blocks):
    found = [block for block in blocks if block.language == "yaml"]
    assert len(found) >= 3
    for block in found:
        msgspec.convert(yaml.safe_load(block.text), Deployment, strict=False)


def test_protocols_exist(pages):
    table = pages["docs/composing.md"].partition("## Replacing a stage")[2]
    named = re.findall(r"`([A-Z]\w+)`", "\n".join(re.findall(r"^\| (`.*?) \|", table, re.M)))
    assert len(named) >= 5
    assert [name for name in named if not hasattr(asyncrl.interfaces, name)] == []


@pytest.mark.parametrize("name", ["flow.svg", "layers.svg"])
def test_drawings_are_well_formed_and_have_a_dark_form(root: Path, name: str):
    import xml.etree.ElementTree as ET

    text = (root / "docs" / name).read_text()
    assert ET.fromstring(text).tag.endswith("svg")
    assert "prefers-color-scheme: dark" in text
