"""The `torch` kind of engine: TorchEngine over a model that Hugging Face loads. It comes with asyncrl."""

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from asyncrl.config import Deployment, ModelSpec
from asyncrl.generate.engines import EngineSite
from asyncrl.models.architectures import not_served
from asyncrl.report.findings import Finding, MachineCheck

if TYPE_CHECKING:
    from asyncrl.generate.embedded.engine import TorchEngine


class TorchKind:
    """An EngineKind (asyncrl.generate.engines)."""

    def check(self, deployment: Deployment) -> str:
        return f"torch: embedded, {deployment.generators.engine.update_mode} updates"

    def not_served(self, model: ModelSpec, config: Mapping[str, Any]) -> str:
        return "" if model.builder else not_served(config)

    def machine_checks(self) -> list[MachineCheck]:
        def look() -> Finding:
            importlib.import_module("asyncrl.generate.embedded.engine")  # importing what it needs is the check
            return Finding(detail="embedded: Hugging Face causal LMs with attention, CPU or GPU")

        return [("torch engine", look, "transformers")]

    def build(self, site: EngineSite) -> "TorchEngine":
        from asyncrl.generate.embedded.engine import TorchEngine
        from asyncrl.models.loading import load_model

        spec, place = site.generators.engine, site.generators.place
        return TorchEngine(
            load_model(site.model, device="cuda" if place.gpus else "cpu"),
            slots=spec.slots,
            max_length=spec.max_length,
            update_mode=spec.update_mode,
            deterministic=spec.deterministic,
            kv_bytes=spec.kv_bytes,
            stream_interval=spec.stream_interval,
        )
