"""Lets the CUDA build of torchvision import next to a CPU build of torch.

Its compiled operators can't be loaded there, but importing it needs two of their schemas, which are declared here. Then the
real package, which stands later on sys.path, takes this module's place.
"""

import importlib.util
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import torch


def _loads(library: Path) -> bool:
    """Whether torchvision's operators were built for this torch; then they declare themselves."""
    try:
        torch.ops.load_library(library)
    except OSError:
        return False
    return True


def _declare() -> torch.library.Library:
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


_here = Path(__file__).resolve().parent
_spec = PathFinder.find_spec(__name__, [entry for entry in sys.path if Path(entry or ".").resolve() != _here])
if _spec is None or _spec.loader is None or _spec.origin is None:
    raise ModuleNotFoundError("torchvision is not on PYTHONPATH after its shim; run deploy/sglang-cpu/install again")
_real = importlib.util.module_from_spec(_spec)
if not _loads(Path(_spec.origin).with_name("_C.so")):
    _real.__dict__["__asyncrl_operators__"] = _declare()  # they live as long as this object does
sys.modules[__name__] = _real
_spec.loader.exec_module(_real)
