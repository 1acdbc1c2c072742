"""What every spec has in common: the base struct, and how a wrong value is refused. No torch."""

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

from msgspec import NODEFAULT, Struct, structs

from asyncrl.errors import ConfigError

# Names of fields, what must hold of each of their values, and what is said after `field=value` where it does not.
Rule = tuple[str, Callable[[Any], bool], str]

SEED_RULE: Rule = (
    "seed",
    lambda x: 0 <= x < 1 << 63,
    "is outside [0, 2**63): torch takes no such seed; use a smaller one, >= 0",
)
MEMORY_RULE: Rule = ("memory_bytes", lambda x: x >= 1 << 24, "< 16 MiB: no Python would run; use null for any")
_fields = cache(structs.fields)  # of a type; looking them up takes longer than all checks


class Spec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every spec: frozen, keyword-only, refuses fields it does not know."""


def require(condition: bool, message: str) -> None:
    """Raises ConfigError with `message` (value, bound, consequence, fix) unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def require_fields(spec: object, where: str, rules: Iterable[Rule]) -> None:
    """Raises ConfigError for the first field that breaks its rule. None breaks none. where: what fields begin with."""
    for names, holds, refusal in rules:
        for field in names.split():
            value = getattr(spec, field)
            require(value is None or holds(value), f"{where}{field}={value!r} {refusal}")


def require_unset(spec: Struct, where: str, names: str, why: str) -> None:
    """Raises ConfigError for the first of the named fields that has not its default. why: with what it would be ignored."""
    for field in _fields(type(spec)):
        value, default = getattr(spec, field.name), field.default
        if default is NODEFAULT and field.default_factory is not NODEFAULT:
            default = field.default_factory()
        if field.name in names.split() and value != default:
            raise ConfigError(f"{where}{field.name}={value!r} with {why} (its default is {default!r})")
