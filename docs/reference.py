"""Writes docs/reference.md: every field of a recipe, a deployment and a warm start, with its type, default and meaning.

    python docs/reference.py            # writes the page
    python docs/reference.py --check    # exits with 1 where the page is stale, and writes nothing

Names, types and defaults come from the structs. A meaning is the `#` comment directly above the field, or behind it on its
line; the class docstring stands above each table.
"""

import ast
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

import msgspec

from asyncrl.config import Deployment, Recipe, SFTSpec
from asyncrl.simulate.costs import Costs

PACKAGE = "asyncrl."
PAGE = Path(__file__).with_name("reference.md")
HEAD = """\
# Reference: every field

<!-- Written by `python docs/reference.py`, from the structs in asyncrl/config and asyncrl/simulate. Do not edit. -->

A field of a recipe is overridden on the command line as `learner.lr=2e-6`, one of a deployment as
`deploy.generators.count=2`, one of a warm start (`asyncrl sft`) as `lr=1e-5`. Values are YAML: `null`, `[a, b]`. A misspelt
field is refused, with the nearest valid name.
"""
# (title, struct, what its fields begin with on the command line, introduction)
ROOTS = (
    ("Recipe", Recipe, "", "A Python file that sets one `Recipe`: see [recipes](recipes.md)."),
    (
        "Deployment",
        Deployment,
        "deploy.",
        "A YAML file, in which the `deploy.` is left out: see [deployments](deployments.md).",
    ),
    ("Warm start", SFTSpec, "", "What `asyncrl sft` does: see [SFT warm start](checkpoints.md#sft-warm-start)."),
    ("Simulation", Costs, "costs.", "What `asyncrl simulate` goes by: see [simulating a run](simulate.md)."),
)
# Structs that a page of its own explains: which choices there are, and what they are good for.
EXPLAINED = {
    "DataSpec": "recipes.md#data",
    "RewardSpec": "rewards.md",
    "StalenessSpec": "staleness.md",
    "AlgorithmSpec": "algorithms.md",
    "CriticSpec": "algorithms.md#classic-ppo",
    "EvaluationSpec": "checkpoints.md#evaluation",
    "CheckpointSpec": "checkpoints.md#checkpoints",
    "SentinelSpec": "sentinels.md",
    "SGLangSpec": "sglang.md",
}


class Field(NamedTuple):
    """A line of the reference. `default` is None where a value is required."""

    name: str
    type: str
    default: str | None
    meaning: str


def page() -> str:
    """The whole page as Markdown. A struct that stands in several places is described at the first."""
    parts, described = [HEAD], set[type]()
    for title, root, prefix, about in ROOTS:
        parts.append(f"## {title}\n\n{about}\n")
        for struct, paths in structs(root, prefix).items():
            if struct not in described:
                parts.append(_section(struct, paths, heading=struct is not root))
                described.add(struct)
    return "\n".join(parts)


def structs(root: type[msgspec.Struct], prefix: str) -> dict[type[msgspec.Struct], list[str]]:
    """Every struct under `root`, in the order of its fields, with each dotted path at which it stands."""
    found: dict[type[msgspec.Struct], list[str]] = {}

    def visit(struct: type[msgspec.Struct], path: str) -> None:
        found.setdefault(struct, []).append(path)
        for field in msgspec.structs.fields(struct):
            for inner, mark in _inner_structs(field.type):
                visit(inner, f"{path}{field.name}{mark}.")

    visit(root, prefix)
    return found


def fields(struct: type[msgspec.Struct], path: str) -> list[Field]:
    """The fields of `struct`, inherited ones included; `path` is what their names begin with."""
    return [
        Field(path + field.name, _type(field.type), _default(field), meanings(struct).get(field.name) or _about(field.type))
        for field in msgspec.structs.fields(struct)
    ]


def _about(kind: Any) -> str:
    """What a group of fields is, where its own comment does not say: the first sentence of its struct's docstring."""
    found = [struct for struct, _ in _inner_structs(kind)]
    text = " ".join(inspect.cleandoc(found[0].__doc__ or "").split()) if len(found) == 1 else ""
    return re.split(r"(?<=[.])\s", text)[0]


@cache
def meanings(struct: type[msgspec.Struct]) -> dict[str, str]:
    """What the comments at the fields say, by field name; a subclass's comment goes before that of its base."""
    found: dict[str, str] = {}
    for cls in reversed(struct.__mro__):
        if cls.__module__.startswith(PACKAGE):
            found |= _commented(cls)
    return found


def _commented(cls: type) -> dict[str, str]:
    lines = textwrap.dedent(inspect.getsource(cls)).splitlines()
    [definition] = ast.parse("\n".join(lines)).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for node in definition.body:
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.end_lineno):
            continue
        above: list[str] = []
        row = node.lineno - 2
        while lines[row].lstrip().startswith("#"):
            above.insert(0, lines[row])
            row -= 1
        # What follows the field's code on its last line, which may only be a comment. Columns of ast are bytes.
        behind = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode()
        said = (comment.strip().removeprefix("#").strip() for comment in [*above, behind])
        text = " ".join(line for line in said if line and not line.startswith("---"))
        if text:
            found[node.target.id] = text
    return found


def _inner_structs(kind: Any) -> Iterator[tuple[type[msgspec.Struct], str]]:
    """The structs in a type, and what marks that they stand in a list or a map."""
    if isinstance(kind, type) and isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        yield kind, ""
    mark = "[]" if get_origin(kind) in (list, tuple, dict) else ""
    for part in get_args(kind):
        yield from ((inner, mark + more) for inner, more in _inner_structs(part))


def _type(kind: Any) -> str:
    origin, inner = get_origin(kind), [part for part in get_args(kind) if part is not Ellipsis]
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if {str, int, float, bool} <= set(inner):
        return "scalar"
    if origin in (Union, UnionType):
        return " or ".join(_type(part) for part in inner)
    if origin in (list, tuple):
        return f"[{', '.join(map(_type, inner))}]" if len(inner) > 1 else f"list of {_type(inner[0])}"
    if origin is dict:
        return f"map of {_type(inner[0])} to {_type(inner[1])}"
    if kind is NoneType:
        return "null"
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return f"[{kind.__name__}](#{kind.__name__.lower()})"
    return {"Any": "any value", "str": "text", "bool": "true or false"}.get(kind.__name__, kind.__name__)


def _default(field: msgspec.structs.FieldInfo) -> str | None:
    if field.required:
        return None
    value = field.default_factory() if field.default is msgspec.NODEFAULT else field.default
    if isinstance(value, msgspec.Struct):
        tag = value.__struct_config__.tag
        return f"`{tag}`" if tag else "as below"
    return f"`{json.dumps(msgspec.to_builtins(value), ensure_ascii=False)}`"


def _section(struct: type[msgspec.Struct], paths: list[str], heading: bool) -> str:
    lines = [f"### {struct.__name__}", ""] if heading else []
    if about := inspect.cleandoc(struct.__doc__ or ""):
        lines += [_escaped(about), ""]
    if page := EXPLAINED.get(struct.__name__):
        lines += [f"See [{page.partition('.')[0]}]({page}).", ""]
    if len(paths) > 1:
        lines += [f"Also at {', '.join(f'`{path[:-1]}`' for path in paths[1:])}.", ""]
    lines += ["| field | type | default | meaning |", "|---|---|---|---|"]
    for field in fields(struct, paths[0]):
        cells = (f"`{field.name}`", field.type, field.default or "required", _escaped(field.meaning))
        lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    """Source text as Markdown: what stands between backticks stays, `<` and `*` elsewhere are no markup."""
    pieces = re.split(r"(`[^`]*`)", text)
    return "".join(piece if at % 2 else re.sub(r"([<*])", r"\\\1", piece) for at, piece in enumerate(pieces))


def main(arguments: list[str]) -> int:
    """Writes the page, or with --check compares it. Returns the exit status."""
    written, found = page(), PAGE.read_text() if PAGE.exists() else ""
    if written == found:
        return 0
    if "--check" in arguments:
        print(f"{PAGE} is stale: run `python docs/reference.py`", file=sys.stderr)
        return 1
    PAGE.write_text(written)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
