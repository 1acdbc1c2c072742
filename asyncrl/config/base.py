"""What every spec has in common: the base struct, and how a wrong value is refused. No torch."""

from msgspec import Struct

from asyncrl.errors import ConfigError


class Spec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every spec: frozen, keyword-only, refuses fields it does not know."""


def require(condition: bool, message: str) -> None:
    """Raises ConfigError with `message` (value, bound, consequence, fix) unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def require_at_least(low: float, spec: Spec, section: str, /, **reasons: str) -> None:
    """Raises ConfigError for a field of `reasons` that is below `low`; None passes. A reason is consequence and fix."""
    for name, reason in reasons.items():
        value = getattr(spec, name)
        require(value is None or value >= low, f"{section}.{name}={value} < {low}: {reason}")
