"""Stands in for Triton where there is no GPU: everything imports, nothing compiles.

SGLang defines its Triton kernels when it is imported, and never launches them on CPU. So any attribute or submodule
resolves to a dummy: upper-case names to classes (for annotations and isinstance), others to modules that can be called as
decorators. Only what runs on the host is real: `cdiv`, `next_power_of_2` and the version.
"""

import importlib.abc
import importlib.machinery
import sys
from types import ModuleType
from typing import Any

__version__ = "3.7.0"


class _Dummy(ModuleType):
    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _resolve(self.__name__, name)

    def __call__(self, *args: Any, **options: Any) -> Any:
        # As @decorator, the function; as @decorator(...), something that takes it.
        return args[0] if len(args) == 1 and callable(args[0]) and not options else self

    def __getitem__(self, _: Any) -> "_Dummy":
        return self


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname.startswith(f"{__name__}."):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Dummy(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def _resolve(parent: str, name: str) -> Any:
    if name[0].isupper():
        return type(name, (), {"__init__": lambda self, *args, **options: None})
    return _Dummy(f"{parent}.{name}")


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return _resolve(__name__, name)


def cdiv(x: int, y: int) -> int:
    return -(-x // y)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


sys.meta_path.insert(0, _Finder())
