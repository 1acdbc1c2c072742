"""A model's configuration, with what the recipe says otherwise. Needs no torch."""

import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from asyncrl.config import ModelSpec
from asyncrl.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def load_config(spec: ModelSpec, field: str = "model") -> "PreTrainedConfig":
    """The configuration of `spec.path`, with the fields of `spec.override_config`.

    Raises ConfigError for what can't be loaded, for fields that its class does not know (with the nearest), and for values
    that it refuses. field: what `spec` is called in the recipe.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            spec.path, trust_remote_code=spec.trust_remote_code, revision=spec.revision or "main"
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"{field}.path={spec.path!r}: no configuration could be loaded: {error}") from error
    _set(config, spec.override_config, f"{field}.override_config")
    return config


def _set(config: Any, fields: Mapping[str, Any], where: str) -> None:
    known = {**config.to_dict(), **config.attribute_map}
    for name, value in fields.items():
        if name not in known or name == "dtype":
            near = difflib.get_close_matches(name, known, n=1)
            hint = "; that is model.dtype" if name == "dtype" else f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{where}: {type(config).__name__} has no field {name!r} that could be set{hint}")
        before = getattr(config, name, None)
        if isinstance(value, dict) and hasattr(before, "to_dict"):
            _set(before, value, f"{where}.{name}")
            continue
        try:
            setattr(config, name, {**before, **value} if isinstance(value, dict) and isinstance(before, dict) else value)
        except Exception as error:  # of the validators of huggingface_hub
            raise ConfigError(f"{where}.{name}={value!r} is refused by {type(config).__name__}: {error}") from error
