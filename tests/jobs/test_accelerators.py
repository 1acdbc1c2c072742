"""What the doctor says of collectives that hang or fail, and of versions that do not match."""

import sys
import time
from importlib import metadata

import pytest

from asyncrl.cluster import resources
from asyncrl.jobs import accelerators
from asyncrl.jobs.accelerators import all_reduce, kernels, matching


def python(code: str) -> tuple[str, ...]:
    """Code in place of a rank: its argument 2 is the rank's number."""
    return sys.executable, "-S", "-c", f"import sys, time\nrank = int(sys.argv[2])\n{code}"


def test_what_all_ranks_sum_up_to_is_looked_at() -> None:
    assert all_reduce("gloo", 2, python("print(3.0)")).detail.startswith("gloo: 2 processes summed 4 MiB, ")
    wrong = all_reduce("gloo", 2, python("print(3.0 - rank)"))
    assert (wrong.status, wrong.required) == ("broken", True)
    assert wrong.detail == "gloo: rank 1 of 2 ended with 0: 2.0"


def test_a_rank_that_fails_is_named_before_those_that_wait_for_it() -> None:
    began = time.monotonic()
    found = all_reduce("nccl", 3, python("if rank == 1: sys.exit('NCCL error: unhandled')\ntime.sleep(60)"))
    assert found.detail == "nccl: rank 1 of 3 ended with 1: NCCL error: unhandled"
    assert (found.fix, found.required) == ("NCCL_DEBUG=INFO asyncrl doctor", False)
    assert time.monotonic() - began < 30


def test_ranks_that_hang_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerators, "DEADLINE_S", 0.3)
    found = all_reduce("gloo", 2, python("time.sleep(60)"))
    assert found.detail == "gloo: rank 0 of 2 did not end within 0.3 s: no message"
    assert "GLOO_SOCKET_IFNAME" in found.fix


def test_versions_that_do_not_match_are_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"sglang": "0.5.20", "torch": "2.13.0", "peft": "0.21.0", "numpy": "1.26.0", "asyncrl": "0.1.0"}
    asked = {
        "asyncrl": ["torch>=2.13,<2.14", "numpy>=2"],
        "sglang": ["torch==2.12.1", "numpy", "nothing>=3; extra == 'all'"],
        "peft": ["numpy>=2"],
    }

    def version(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "requires", asked.get)
    found = matching()
    assert found.detail == (
        "sglang 0.5.20 needs torch==2.12.1, and 2.13.0 is installed; peft 0.21.0 needs numpy>=2, and 1.26.0 is installed"
    )
    assert found.fix == (
        "pip uninstall sglang   (asyncrl needs torch<2.14,>=2.13: give sglang another venv); pip install 'numpy>=2'"
    )


def test_a_driver_too_old_for_torchs_cuda_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(accelerators, "_PINNING", ())
    monkeypatch.setattr(resources, "ask_driver", lambda *arguments: ["550.54.15"])
    assert "torch is built for CUDA 13.0, which needs a driver >= 580, and this is 550.54.15" in matching().detail
    monkeypatch.setattr(resources, "ask_driver", lambda *arguments: ["580.65.06"])
    assert matching().status == "ok"


def test_kernels_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(accelerators, "installed_version", {"liger-kernel": "0.7.0", "flash-attn": ""}.get)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernels().detail == (
        "attention: SDPA; layers: transformers' own; liger-kernel 0.7.0, for GPUs; flash-attn is not installed, and not needed"
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert kernels().detail == (
        "attention: torch's varlen flash attention in bfloat16, SDPA in float32; layers: liger-kernel 0.7.0; flash-attn is not "
        "installed, and not needed"
    )
