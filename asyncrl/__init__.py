"""asyncrl: asynchronous reinforcement learning for language models. Importing it loads neither torch nor Ray."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asyncrl.api import Callbacks, RunResult, Trainer, launch
    from asyncrl.config import Deployment, Recipe

__version__ = "0.1.0"
__all__ = ["Callbacks", "Deployment", "Recipe", "RunResult", "Trainer", "launch"]


def __getattr__(name: str) -> Any:
    if name in {"Deployment", "Recipe", "config"}:
        config = importlib.import_module("asyncrl.config")
        return config if name == "config" else getattr(config, name)
    if name in {"Callbacks", "Trainer", "launch", "RunResult"}:
        from asyncrl import api

        return getattr(api, name)
    raise AttributeError(f"module 'asyncrl' has no attribute {name!r}")
