"""What went wrong in a spec, in one sentence: dotted path, value, expected type, and the nearest valid name."""

import difflib
import re
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import msgspec

_UNKNOWN_FIELD = re.compile(r"unknown field `(.*?)`")
_MISSING = re.compile(r"missing required field `(.*?)`")
_AT = re.compile(r" - at `(?:key in )?\$(.*)`$")


def explain(error: msgspec.ValidationError, spec: type[msgspec.Struct], data: Any) -> tuple[str, str]:
    """(dotted path of the mistake, sentence) from msgspec's message, with value and nearest name."""
    text = str(error)
    at = _AT.search(text)
    path = re.sub(r"\[.*?\]", "", at[1]).strip(".") if at else ""
    text = _AT.sub("", text)
    kind: Any = spec
    stated: Any = spec  # the same, with what else may stand there
    for name in filter(None, path.split(".")):
        stated = {field.name: field.type for field in msgspec.structs.fields(kind)}[name] if is_struct(kind) else Any
        kind = struct_in(stated)
        data = data.get(name, data) if isinstance(data, dict) else data  # of groups under names of the user's: all of them
    if (unknown := _UNKNOWN_FIELD.search(text)) and is_struct(kind):
        full = f"{path}.{unknown[1]}".strip(".")
        value = data.get(unknown[1]) if isinstance(data, dict) else None
        return full, f"{full}={value!r}: {path or spec.__name__} has no field {unknown[1]!r}" + nearest(unknown[1], kind, spec)
    if is_struct(kind) and not isinstance(data, dict) and {*get_args(stated)} <= {kind, NoneType}:
        return path, f"{path or spec.__name__}={data!r} must be a group of fields: {names(kind)}"
    if (missing := _MISSING.search(text)) and isinstance(data, dict) and missing[1] not in data:
        without = [name for name, one in data.items() if isinstance(one, dict) and missing[1] not in one]
        if without:
            there = ", ".join(sorted(data.keys() - without)) or "none"
            return path, f"{path}.{without[0]} has no {missing[1]!r}, which it needs; of {path} there are: {there}"
    if not path or (is_struct(kind) and isinstance(data, dict)):
        return path, f"{path or spec.__name__}: {text}"
    return path, f"{path}={data!r} must be {expected(stated)}: {text}"


def nearest(name: str, kind: type[msgspec.Struct], root: type[msgspec.Struct] | None = None) -> str:
    """`; did you mean …? Valid: …`: among the fields beside it, else anywhere in the spec."""
    near = difflib.get_close_matches(name, kind.__struct_fields__, n=1, cutoff=0.6)
    near = near or [path for path in _leaves(root or kind) if path.rpartition(".")[2] == name][:1]
    return (f"; did you mean {near[0]!r}?" if near else ".") + f" Valid: {names(kind)}"


def _leaves(kind: type[msgspec.Struct], prefix: str = "") -> list[str]:
    leaves = []
    for field in msgspec.structs.fields(kind):
        path = prefix + field.name
        leaves += _leaves(field.type, f"{path}.") if is_struct(field.type) else [path]
    return leaves


def names(kind: type[msgspec.Struct]) -> str:
    return ", ".join(kind.__struct_fields__)


def struct_in(kind: Any) -> Any:
    """Of `Struct or null` the struct; any other type as it is."""
    return next((member for member in get_args(kind) if is_struct(member)), kind)


def is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def expected(kind: Any) -> str:
    """A type in words: `int or null`, `list of str`, `'mask', 'wait' or 'drop'`."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(repr(value) for value in inner)
    if origin in (Union, UnionType):
        return " or ".join(expected(part) for part in inner)
    if origin in (list, tuple):
        return f"a list of {expected(inner[0])}"
    if is_struct(kind):
        return f"a group of fields ({names(kind)})"
    return "null" if kind is NoneType else getattr(kind, "__name__", str(kind))
