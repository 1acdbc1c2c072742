"""A user's function by name: `package.module:name`, `package.module.name` or `path/to/file.py:name`. No torch.

A function that is given itself gets such a name (`reference_to`), so that specs are data. One that no other process could find
(of `__main__`, of a notebook, a lambda, a closure) is known by a name of this process alone, until the run saves it by value.
"""

import ast
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import pickle
import re
import symtable
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import reduce
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import msgspec

from asyncrl.errors import ConfigError

_PACKAGE = str(Path(__file__).parents[1])  # asyncrl's own folder
if TYPE_CHECKING:
    Function = Any  # a name, or the function itself
else:
    Function = str  # by then it has a name

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
RECIPE_MODULE = "asyncrl_recipe"  # what a recipe's file is while it is read; no other process has it
UNSAVED = "given-"  # begins a name that holds in this process only
GIVEN: dict[str, Callable[..., Any]] = {}  # what was given itself in this process, by each name that it has got


class SavedFunction(msgspec.Struct, frozen=True):
    """A function by value: the content of a file that ends with `.pkl`."""

    python: str  # the version that wrote it: no other reads its bytecode
    folder: str  # where the program that it comes from finds its neighbours
    pickled: bytes


# ----------------------------------------------------------------------------------- functions given themselves


def name_functions(spec: msgspec.Struct, fields: str) -> None:
    """Puts names in the place of functions that were given themselves, in a spec that is being made."""
    for field in fields.split():
        value = getattr(spec, field)
        if callable(value):
            msgspec.structs.force_setattr(spec, field, reference_to(value))
        elif isinstance(value, tuple):
            named = tuple(reference_to(one) if callable(one) else one for one in value)
            msgspec.structs.force_setattr(spec, field, named)


def reference_to(function: Callable[..., Any]) -> str:
    """A name of the function: one that every process finds, if it has one; else one in GIVEN, of this process alone."""
    module, name = sys.modules.get(getattr(function, "__module__", None) or ""), getattr(function, "__qualname__", "")
    bound: Any = reduce(lambda found, part: getattr(found, part, None), name.split("."), module)
    if module is not None and module.__name__ != "__main__" and bound is function:
        file = getattr(module, "__file__", None) or ""
        dotted = _find_module(module.__name__) if "." in module.__name__ or not file.endswith(".py") else None
        if place := module.__name__ if dotted else file:
            return f"{place}:{name}"
    label = re.sub(r"\W", "", name.rpartition(".")[2]) or type(function).__name__
    new = f"{UNSAVED}{len(GIVEN) + 1}:{label}"
    reference = next((reference for reference, known in GIVEN.items() if known is function), new)
    GIVEN[reference] = function
    return reference


# ------------------------------------------------------------------------------------------ functions by name


def load_callable(reference: str, what: str = "function") -> Callable[..., Any]:
    """Imports the module and returns the function. `what` is the field that named it, for the error.

    A file's folder (for a module: the working directory) joins the end of sys.path, so that it can import its
    neighbours. Raises ConfigError: no such file, module or name (with the nearest), or the import itself failed.
    """
    if reference in GIVEN:
        return GIVEN[reference]
    with _named(reference, what):
        where, name = _split(reference)
        place = _find(where)
        _find_neighbours_in(place.parent if isinstance(place, Path) else Path.cwd())
        try:
            if isinstance(place, Path) and place.suffix == ".pkl":
                return _unpickled(place)
            module = _module_from(place) if isinstance(place, Path) else importlib.import_module(where)
        except ConfigError:
            raise
        except (Exception, SystemExit) as error:
            raise ConfigError(f" could not be imported: {describe(error)}") from error
        found: Any = module
        for part in name.split("."):
            if not hasattr(found, part):
                raise ConfigError(_no_name(part, dir(found), where))
            found = getattr(found, part)
        if not callable(found):
            raise ConfigError(f": {name!r} is a {type(found).__name__}, not a function")
        return found


def check_callable(reference: str, what: str = "function") -> None:
    """Proves from the source alone, importing nothing, that file and name exist. Raises ConfigError as `load_callable`.

    Passes what source can't tell: compiled modules, names that a star import or a module-level __getattr__ may bring.
    """
    if reference in GIVEN:
        return
    with _named(reference, what):
        where, name = _split(reference)
        place = _find(where)
        path = place if isinstance(place, Path) else Path(place.origin or "")
        if path.suffix != ".py":
            return
        try:
            names = _names(path.read_bytes(), str(path))
        except SyntaxError as error:
            raise ConfigError(f": {path} line {error.lineno} is not Python: {error.msg}") from error
        first = name.split(".")[0]
        if not names & {first, "*", "__getattr__"}:
            raise ConfigError(_no_name(first, names, where))


def is_file(where: str) -> bool:
    """Whether what stands before the function's name is a path, and not a module."""
    return where.endswith(".py") or "/" in where


@contextmanager
def _named(reference: str, what: str) -> Iterator[None]:
    """Puts the field and its value before what is wrong with it."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{what}={reference!r}{error}") from error.__cause__


def _split(reference: str) -> tuple[str, str]:
    if reference.endswith(".py"):
        raise ConfigError(f" names a file and no function; write {reference}:name")
    where, _, name = reference.rpartition(":") if ":" in reference else reference.rpartition(".")
    if not where or not all(part.isidentifier() for part in name.split(".")):
        raise ConfigError(" names no function; write package.module:name or path/to/file.py:name")
    return where, name


def _find(where: str) -> Path | ModuleSpec:
    if where.startswith(UNSAVED):
        raise ConfigError(
            ": only the process that was given this function knows it, until a run saves it; name it as path/to/file.py:name"
        )
    if not is_file(where):
        if (spec := _find_module(where)) is None:
            raise ConfigError(
                f": no module {where!r} on the Python path or in {Path.cwd()}; install it, or name a file: path/to/file.py:name"
            )
        return spec
    path = Path(where).expanduser().absolute()
    if path.is_file():
        return path
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.py")], n=1)
    raise ConfigError(f": no file {path}" + (f"; did you mean {path.with_name(near[0])}?" if near else ""))


def _find_module(dotted: str) -> ModuleSpec | None:
    """The module's spec without importing its parents, unlike importlib.util.find_spec."""
    path: list[str] | None = [*sys.path, str(Path.cwd())]
    spec: ModuleSpec | None = None
    parts = dotted.split(".")
    for depth in range(1, len(parts) + 1):
        spec = PathFinder.find_spec(".".join(parts[:depth]), path) if path else None
        if spec is None:
            # Modules made at run time, built-in, or found by an editable install's own finder. None of it is imported:
            # find_spec would import a parent only, and there is none.
            loaded = sys.modules.get(".".join(parts[:depth]))
            spec = loaded.__spec__ if loaded else importlib.util.find_spec(parts[0]) if depth == 1 else None
        if spec is None:
            return None
        path = list(spec.submodule_search_locations or ())
    return spec


def _find_neighbours_in(folder: str | Path) -> None:
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _unpickled(path: Path) -> Callable[..., Any]:
    saved = msgspec.msgpack.decode(path.read_bytes(), type=SavedFunction)
    if saved.python != PYTHON:
        raise ConfigError(
            f": saved by Python {saved.python}, whose bytecode Python {PYTHON} can't run; give the function again, or "
            "name one in a file: path/to/file.py:name"
        )
    _find_neighbours_in(saved.folder)
    function: Callable[..., Any] = pickle.loads(saved.pickled)
    return function


def _module_from(path: Path) -> ModuleType:
    name = f"asyncrl_user_{path.stem}_{hashlib.blake2b(str(path).encode(), digest_size=4).hexdigest()}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up while it is being executed
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def named_parameters(signature: inspect.Signature) -> tuple[dict[str, inspect.Parameter], bool]:
    """The parameters that can be passed by name, and whether `**kwargs` takes any other."""
    parameters = signature.parameters
    named = {name: p for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return named, any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def describe(error: BaseException, module: str = "") -> str:
    """Type, message and innermost frame of an error, in one line: one in `module` if there is any, else none of asyncrl's."""
    frames: list[traceback.FrameSummary] = traceback.extract_tb(error.__traceback__)
    file = getattr(sys.modules.get(module), "__file__", None)
    frames = [f for f in frames if f.filename == file] or [f for f in frames if not f.filename.startswith(_PACKAGE)]
    where = f" ({frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name})" if frames else ""
    return f"{type(error).__name__}: {error}"[:500] + where


def _names(source: bytes, path: str) -> set[str]:
    """Names that a module binds, branches of `if` and `try` included; `*` if it imports one whole."""
    # bytes, which its stub does not know of, keep the encoding that the source declares
    symbols = symtable.symtable(source, path, "exec").get_symbols()  # type: ignore[arg-type]
    names = {symbol.get_name() for symbol in symbols if symbol.is_assigned() or symbol.is_imported()}
    imports = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom))
    return names | {"*" for node in imports if node.names[0].name == "*"}


def _no_name(name: str, known: Iterable[str], where: str) -> str:
    public = sorted(n for n in known if not n.startswith("_"))
    near = difflib.get_close_matches(name, public, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(public[:8]) or 'none'}"
    return f": {where} has no {name!r}; {hint}"
