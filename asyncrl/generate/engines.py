"""What every kind of engine offers to those who check, build and start it. To add one: its package, and a line in ENGINES."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from msgspec import Struct

from asyncrl.config import Deployment, GeneratorsSpec, LimitsSpec, ModelSpec
from asyncrl.config.deployment import ENGINES
from asyncrl.interfaces import Engine
from asyncrl.report.findings import MachineCheck


class EngineSite(Struct, frozen=True, kw_only=True):
    """For which generator an engine is built, and where it stands."""

    generators: GeneratorsSpec
    model: ModelSpec  # its dtype is the one that the engine serves in
    limits: LimitsSpec = LimitsSpec()
    name: str  # of the generator; logs are called after it
    logs: Path  # folder
    host: str = "127.0.0.1"  # this node's address, for sockets that other nodes reach


class EngineKind(Protocol):
    """Importing and making one loads neither torch nor any of the engine's own packages; only `build` does."""

    def check(self, deployment: Deployment) -> str:
        """One sentence of the plan of a run. Raises ConfigError if this machine is to run the engine and can't."""

    def not_served(self, model: ModelSpec, config: Mapping[str, Any]) -> str:
        """Why the engine can't serve a model, with this config.json, and what to do; empty if nothing is known against it."""

    def machine_checks(self) -> list[MachineCheck]:
        """The engine's rows of `asyncrl doctor`."""

    def build(self, site: EngineSite) -> Engine:
        """An engine that is not yet started. Raises ConfigError for what can't work."""


def engine_kind(name: str) -> EngineKind:
    """The kind that a deployment calls `name`."""
    module, _, attribute = ENGINES[name].partition(":")
    kind: EngineKind = getattr(importlib.import_module(module), attribute)()
    return kind
