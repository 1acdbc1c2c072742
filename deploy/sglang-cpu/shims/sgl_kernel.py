"""Stands in for SGLang's CUDA kernels where there is no GPU: imports, and refuses every call.

It registers no `torch.ops.sgl_kernel`, which is how SGLang knows to take its plain torch paths.
"""

from collections.abc import Callable


def __getattr__(name: str) -> Callable[..., object]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_: object, **__: object) -> object:
        raise NotImplementedError(f"sgl_kernel.{name}: this engine runs on CPU, without SGLang's CUDA kernels")

    return missing
