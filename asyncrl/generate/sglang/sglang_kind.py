"""The `sglang` kind of engine: what it needs on this machine. SGLang is found by its metadata, and never imported."""

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from asyncrl.config import Deployment, ModelSpec, SGLangSpec
from asyncrl.config.base import require
from asyncrl.errors import ConfigError
from asyncrl.generate.engines import EngineSite
from asyncrl.generate.sglang.keys import read_key
from asyncrl.generate.sglang.process import find_program, require_command, sglang_of
from asyncrl.report.findings import Finding, MachineCheck, installed_version

if TYPE_CHECKING:
    from asyncrl.generate.sglang.engine import SGLangEngine

GPU_FIX = "pip install 'asyncrl[sglang]'"
CPU_FIX = "deploy/sglang-cpu/install"
CPU_COMMAND = "sglang-cpu-server"
KERNELS = "sglang-kernel"  # the package of SGLang's CUDA kernels: the CPU engine does without


class SGLangKind(NamedTuple):
    """An EngineKind (asyncrl.generate.engines). Its fields say what this machine is like; tests make them up."""

    environ: Mapping[str, str] = os.environ
    installed: Callable[[str], str] = installed_version  # version by package name, empty if it is not there
    find: Callable[[str], str | None] = find_program  # path by command name
    prefix: Path = Path(sys.prefix)  # of this Python's environment

    def check(self, deployment: Deployment) -> str:
        """Looks for the servers' command, or their key, on this machine; not on a cluster, where the generators' machines are
        others than the driver's, and refuse by themselves."""
        generators, engine = deployment.generators, deployment.generators.engine
        sglang, updates = engine.sglang, f"{engine.update_mode} updates"
        limits = deployment.limits
        require(
            limits.update_timeout_s < limits.stall_timeout_s,
            f"limits.update_timeout_s={limits.update_timeout_s:g} >= limits.stall_timeout_s={limits.stall_timeout_s:g}: a "
            "server that hangs while it takes weights would end the run instead of being replaced; make it much smaller",
        )
        address = deployment.ray_address or self.environ.get("RAY_ADDRESS", "")
        if sglang.urls:
            if sglang.api_key_file and not address:
                read_key(sglang.api_key_file)
            key = f"with the key in {sglang.api_key_file}" if sglang.api_key_file else "without a key"
            return f"sglang: attached to {', '.join(sglang.urls)}, {key}; {updates}"
        program = " ".join(sglang.launcher)
        count = f"{generators.least}" if generators.least == generators.most else f"{generators.least} to {generators.most}"
        plan = f"sglang: {count} × {sglang.servers} servers, tensor parallel {sglang.tp_size}, by `{program}`; {updates}"
        if address:
            return f"{plan}; the generators' nodes of the Ray at {address} must have it"
        if sglang.python:
            return f"{plan}; its environment has sglang {sglang_of(sglang.launcher[0])}"
        require_command(sglang.command)
        if sglang.command == SGLangSpec().command and not (self.installed("sglang") and self.installed(KERNELS)):
            raise ConfigError(
                f"generators.engine.kind='sglang': {self._without_kernels() or 'sglang is not installed here'}, so `{program}` "
                f"could not start a server; with GPUs {GPU_FIX}; on a CPU run {CPU_FIX} and set "
                f"deploy.generators.engine.sglang.command=[{CPU_COMMAND}]"
            )
        return plan

    def _without_kernels(self) -> str:
        version = self.installed("sglang")
        return f"sglang {version} is here without its CUDA kernels" if version else ""

    def not_served(self, model: ModelSpec, config: Mapping[str, Any]) -> str:
        if not model.builder:
            return ""  # its servers tell, when they start
        return (
            f"its servers load a folder, and can't call model.builder={model.builder!r}; save what it makes with "
            "save_pretrained, and name that folder in model.path"
        )

    def machine_checks(self) -> list[MachineCheck]:
        return [("sglang (GPU)", self._gpu, ""), ("sglang (CPU)", self._cpu, "")]

    def _gpu(self) -> Finding:
        use = "production engine"
        version, kernels = self.installed("sglang"), self.installed(KERNELS)
        if version and kernels:
            return Finding(detail=f"sglang {version}, {KERNELS} {kernels}: {use}", required=False)
        detail = "; ".join(filter(None, (use, self._without_kernels())))
        return Finding(status="missing", detail=detail, fix=GPU_FIX, required=False)

    def _cpu(self) -> Finding:
        """The command that deploy/sglang-cpu/install makes, and the sglang that it starts."""
        use, own = "SGLang without GPUs", self.prefix / "bin" / CPU_COMMAND
        found, version = self.find(CPU_COMMAND), self.installed("sglang")
        if found and Path(found).resolve() != own.resolve():
            return Finding(detail=f"{found}, of another environment: {use}", required=False)
        if not found and not own.exists():
            return Finding(status="missing", detail=use, fix=CPU_FIX, required=False)
        if not version:
            return Finding(status="broken", detail=f"{own} without sglang", fix=CPU_FIX, required=False)
        return Finding(detail=f"sglang {version}, {CPU_COMMAND}: {use}", required=False)

    def build(self, site: EngineSite) -> "SGLangEngine":
        from asyncrl.generate.sglang.build import sglang_engine

        return sglang_engine(site)
