"""Recipe and deployment files into validated structs. Every mistake names file, line, path, value and the nearest valid name.

A recipe is a Python file that sets `recipe = Recipe(...)` (or defines `recipe() -> Recipe`); it runs with its folder
importable. A deployment is a YAML file. Overrides `a.b=c` are typed by the field they set, and come last; those that begin
with `deploy.` set the deployment. No torch, no Ray: a mistake costs well under two seconds.
"""

import ast
import re
import sys
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, get_args, get_origin

import msgspec
import yaml

from asyncrl import config
from asyncrl.config.base import Spec
from asyncrl.config.callables import RECIPE_MODULE
from asyncrl.config.deployment import Deployment
from asyncrl.config.explain import expected, explain, is_struct, names, nearest, struct_in
from asyncrl.config.names import elsewhere
from asyncrl.config.recipe import Recipe
from asyncrl.errors import AsyncRLError, ConfigError

S = TypeVar("S", bound=msgspec.Struct)

_DEPLOY = "deploy."
_UNKNOWN_KEYWORD = re.compile(r"[Uu]nexpected keyword argument '(\w+)'")


def load_specs(recipe: str | Path, deploy: str | Path | None, overrides: Sequence[str]) -> tuple[Recipe, Deployment]:
    """Both specs of a run, overrides applied: those that begin with `deploy.` are the deployment's."""
    for_deployment = [text for text in overrides if text.startswith(_DEPLOY)]
    for_recipe = [text for text in overrides if not text.startswith(_DEPLOY)]
    return override(load_recipe(recipe), for_recipe), load_deployment(deploy, for_deployment)


def _read(what: str, path: Path, suffix: str) -> str:
    """The file's text. suffix: of the files beside it that an error names."""
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else "") or str(error)
        found = sorted(str(file) for file in path.parent.glob(f"*{suffix}"))[:5] if path.parent.is_dir() else []
        near = f"; that folder has {', '.join(found)}" if found else ""
        raise ConfigError(f"{what} {path}: cannot be read ({reason}){near}") from error


# ------------------------------------------------------------------------------------------------- recipe


def load_recipe(path: str | Path) -> Recipe:
    """Runs a recipe file and validates what it made, or reads a run's recipe.json. Raises ConfigError with file and line."""
    path = Path(path)
    source = _read("recipe", path, ".py")
    if path.suffix == ".json":
        try:
            return msgspec.json.decode(source, type=Recipe)
        except msgspec.MsgspecError as error:
            raise ConfigError(f"{path} is no recipe of this version of asyncrl: {error}") from error
    try:
        made = _execute(path, source)
        made = made() if callable(made) else made
    except SyntaxError as error:
        raise ConfigError(f"recipe {error.filename}, line {error.lineno}: {error.msg}: {(error.text or '').strip()}") from error
    except Exception as error:
        raise ConfigError(_raised(path, source, error)) from error
    if not isinstance(made, Recipe):
        raise ConfigError(f"recipe {path}: `recipe` is a {type(made).__name__}, not an asyncrl.Recipe")
    try:
        return msgspec.convert(msgspec.to_builtins(made), Recipe)
    except msgspec.ValidationError as error:
        where, what = explain(error, Recipe, msgspec.to_builtins(made))
        line = _line_of(where, source)
        raise ConfigError(f"recipe {path}{f', line {line}' if line else ''}: {what}") from error


def _execute(path: Path, source: str) -> Any:
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    module = ModuleType(RECIPE_MODULE)
    module.__file__ = str(path.resolve())
    sys.modules[module.__name__] = module  # structs and dataclasses look their module up
    exec(compile(source, str(path), "exec"), module.__dict__)
    if isinstance(getattr(module, "recipe", module), ModuleType):  # `import *` brings asyncrl.config.recipe
        raise ConfigError("sets no `recipe`; end it with `recipe = Recipe(...)`")
    return module.recipe


def _line_of(field: str, source: str) -> int | None:
    """Where a field's value is given as a keyword argument; None if that is in no place, or in several."""
    words = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.keyword)]
    lines = [word.value.lineno for word in words if word.arg == field.rpartition(".")[2]]
    return lines[0] if len(lines) == 1 else None


def _raised(path: Path, source: str, error: Exception) -> str:
    """One line for whatever a recipe raised: its last own line, and the nearest argument name after a typo."""
    frames = list(traceback.walk_tb(error.__traceback__))
    lines = [line for frame, line in frames if frame.f_code.co_filename == str(path)]
    line = lines[-1] if lines else None
    text = str(error) if isinstance(error, AsyncRLError) else f"{type(error).__name__}: {error}"
    # A struct trusts its types when made from Python; where its own checks trip over a wrong one, say which.
    made = next((own for frame, _ in frames if isinstance(own := frame.f_locals.get("self"), Spec)), None)
    if isinstance(error, TypeError) and made is not None:
        try:
            msgspec.convert(msgspec.to_builtins(made), type(made))
        except msgspec.ValidationError as cause:
            where, text = explain(cause, type(made), msgspec.to_builtins(made))
            line = _line_of(where, source) or line
    if (typo := _UNKNOWN_KEYWORD.search(text)) and line is not None:
        for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
            words = [word for word in call.keywords if word.arg == typo[1]]
            struct = getattr(config, ast.unparse(call.func).rpartition(".")[2], None)
            if words and isinstance(struct, type) and issubclass(struct, msgspec.Struct):
                line, text = words[0].value.lineno, f"{struct.__name__} has no field {typo[1]!r}"
                text += elsewhere(typo[1]) or nearest(typo[1], struct)
    return f"recipe {path}{f', line {line}' if line else ''}: {text}"


# ---------------------------------------------------------------------------------------------- overrides


def override(spec: S, overrides: Iterable[str], prefix: str = "") -> S:
    """The same spec with `a.b=c` applied, validated as a whole afterwards. Raises ConfigError naming the override.

    prefix: what each path begins with on the command line.
    """
    data = msgspec.to_builtins(spec)
    for text in overrides:
        path, equals, raw = text.partition("=")
        if not equals:
            raise ConfigError(f"override {text!r}: expected FIELD=VALUE, for example learner.lr=1e-5")
        path = path.removeprefix(prefix)
        node, kind = data, _field_type(type(spec), path, text)
        *parents, leaf = path.split(".")
        for parent in parents:
            if not isinstance(node.get(parent), dict):  # an optional group that is not there yet, or one of its own
                node[parent] = {}
            node = node[parent]
        node[leaf] = _parse(raw, kind, text, path)
    try:
        return msgspec.convert(data, type(spec))
    except msgspec.ValidationError as error:
        raise ConfigError(f"override: {explain(error, type(spec), data)[1]}") from error


def _field_type(spec: type[msgspec.Struct], path: str, text: str) -> Any:
    kind: Any = spec
    for depth, name in enumerate(path.split(".")):
        parent = ".".join(path.split(".")[:depth])
        if get_origin(kind) is dict and is_struct(get_args(kind)[1]):  # of groups, each under a name of the user's
            kind = get_args(kind)[1]
            continue
        kind = kind if get_origin(kind) in (list, tuple) else struct_in(kind)
        if not is_struct(kind):
            raise ConfigError(f"override {text!r}: {parent} is {expected(kind)} and has no field {name!r}")
        fields = {field.name: field.type for field in msgspec.structs.fields(kind)}
        if name not in fields:
            hint = (elsewhere(path) if spec is Recipe else "") or nearest(name, kind, spec)
            if spec is Recipe and depth == 0 and name in Deployment.__struct_fields__:
                hint = f"; it is the deployment's: write {_DEPLOY}{path}=…"
            raise ConfigError(f"override {text!r}: {parent or spec.__name__} has no field {name!r}{hint}")
        kind = fields[name]
    if is_struct(kind):
        raise ConfigError(f"override {text!r}: {path} is a group; set one of its fields: {names(kind)}")
    return kind


def _parse(raw: str, kind: Any, text: str, path: str) -> Any:
    """The text as `kind`: a scalar, else YAML (`[a, b]`, `null`), else the one element of a list."""
    try:
        return msgspec.to_builtins(msgspec.convert(raw, kind, strict=False))
    except msgspec.ValidationError as first:
        try:
            parsed = None if raw == "None" else yaml.safe_load(raw)
        except yaml.YAMLError as error:
            raise ConfigError(
                f"override {text!r}: the value is not YAML: {getattr(error, 'problem', None) or error}"
            ) from error
        for value in (parsed, *([] if isinstance(parsed, dict | list) else [[raw]])):
            try:
                return msgspec.to_builtins(msgspec.convert(value, kind, strict=False))
            except msgspec.ValidationError:
                pass  # the next reading of the text, then the error below
        raise ConfigError(f"override {text!r}: {path} must be {expected(kind)}, not {raw!r}") from first


# --------------------------------------------------------------------------------------------- deployment


def load_deployment(path: str | Path | None, overrides: Sequence[str] = ()) -> Deployment:
    """Reads a deployment file and applies overrides `deploy.a.b=c`. Raises ConfigError with file and line.

    path None: the defaults, which deploy/local.yaml spells out.
    """
    return override(Deployment() if path is None else _read_deployment(Path(path)), overrides, _DEPLOY)


def _read_deployment(path: Path) -> Deployment:
    text = _read("deployment", path, ".yaml")
    try:
        tree, data = yaml.compose(text), yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"deployment {path}{line}: not YAML: {error.problem}") from error
    if data is None:
        return Deployment()
    try:
        return msgspec.convert(data, Deployment, strict=False)
    except msgspec.ValidationError as error:
        where, what = explain(error, Deployment, data)
        raise ConfigError(f"deployment {path}, line {_line(tree, where)}: {what}") from error
    except ConfigError as error:
        raise ConfigError(f"deployment {path}: {error}") from error


def _line(node: yaml.Node, path: str) -> int:
    line = node.start_mark.line + 1
    for name in filter(None, path.split(".")):
        found = [pair for pair in node.value if pair[0].value == name] if isinstance(node, yaml.MappingNode) else []
        if not found:
            break
        line, node = found[0][0].start_mark.line + 1, found[0][1]
    return line
