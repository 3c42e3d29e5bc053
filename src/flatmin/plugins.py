"""The folder is the registry: plug-ins are files, and their settings are read without running them.

A plug-in is a file with one public function of the file's own name, its entry function. Listing reads file
names and source text only, so nothing is imported until a plug-in is used. Another distribution
adds plug-ins through entry points of the groups below.

    [project.entry-points."flatmin.optimizers"]
    lion = "my_package.lion:lion"
"""

from __future__ import annotations

import ast
import builtins
import importlib
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata, util
from pathlib import Path
from typing import Any

from flatmin.errors import RequestError, nearest
from flatmin.settings import REQUIRED, Argument, Setting

FOLDERS: Mapping[str, str] = {
    "network": "flatmin.trainables.networks",
    "dataset": "flatmin.trainables.datasets",
    "optimizer": "flatmin.optimizers",
    "measure": "flatmin.sharpness",
    "training": "flatmin.trainables.training",
}
"""Where each kind of plug-in lives; `training` is the one loop that all models share."""

GROUPS: Mapping[str, str] = {
    "network": "flatmin.networks",
    "dataset": "flatmin.datasets",
    "optimizer": "flatmin.optimizers",
    "measure": "flatmin.measures",
}

_ANNOTATION_NAMES = {"Annotated": typing.Annotated, "Literal": typing.Literal, "Setting": Setting}


@dataclass(frozen=True)
class Plugin:
    """One plug-in as its source declares it.

    Attributes:
        kind: `network`, `dataset`, `optimizer`, `measure` or `training`.
        name: The name in studies, tables and reports.
        module: The module to import when it is used.
        function: The entry function in that module.
        returns: The entry function's return annotation as written (`Base` or `Rule` for optimizers).
        arguments: Its settings by name, in the order of the signature.
        about: The first line of the entry function's docstring.
    """

    kind: str
    name: str
    module: str
    function: str
    returns: str
    arguments: Mapping[str, Argument]
    about: str

    def load(self) -> Callable[..., Any]:
        """Import the plug-in's module and return its entry function."""
        entry: Callable[..., Any] = getattr(importlib.import_module(self.module), self.function)
        return entry


def listing(kind: str) -> dict[str, Plugin]:
    """Return every plug-in of a kind by name: the folder's files first, then entry points."""
    found = dict(_folder(kind))
    if kind in GROUPS:
        for point in metadata.entry_points(group=GROUPS[kind]):
            if point.name in found:
                raise RequestError(
                    f"{kind} '{point.name}' is declared twice: by {found[point.name].module} and by {point.value}"
                )
            found[point.name] = _external(kind, point)
    return found


def get(kind: str, name: str) -> Plugin:
    """Return one plug-in.

    Raises:
        RequestError: No plug-in has that name.
    """
    plugins = listing(kind)
    if name not in plugins:
        raise RequestError(f"there is no {kind} '{name}'.{nearest(name, plugins)}")
    return plugins[name]


@cache
def _folder(kind: str) -> dict[str, Plugin]:
    root = Path(__file__).parent
    place = root.joinpath(*FOLDERS[kind].split(".")[1:])
    if place.with_suffix(".py").exists():
        files, package = [place.with_suffix(".py")], FOLDERS[kind].rpartition(".")[0]
    else:
        files, package = sorted(place.glob("*.py")), FOLDERS[kind]
    found = {}
    for file in files:
        plugin = _read(kind, file, f"{package}.{file.stem}", file.stem)
        if plugin is not None:
            found[plugin.name] = plugin
    return found


@cache
def _external(kind: str, point: metadata.EntryPoint) -> Plugin:
    spec = util.find_spec(point.module)
    if spec is None or spec.origin is None:
        raise RequestError(f"the entry point {point.name} = {point.value!r} names a module that cannot be found")
    plugin = _read(kind, Path(spec.origin), point.module, point.attr)
    if plugin is None:
        raise RequestError(f"{point.module} has no function '{point.attr}', which its entry point names")
    return Plugin(kind, point.name, plugin.module, plugin.function, plugin.returns, plugin.arguments, plugin.about)


def _read(kind: str, file: Path, module: str, function: str) -> Plugin | None:
    tree = ast.parse(file.read_text(encoding="utf-8"), filename=str(file))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == function:
            arguments = {
                argument.name: argument for argument in map(_argument, node.args.kwonlyargs, node.args.kw_defaults)
            }
            returns = ast.unparse(node.returns) if node.returns else ""
            about = (ast.get_docstring(node) or "").partition("\n")[0]
            return Plugin(kind, function, module, function, returns, arguments, about)
    return None


def _argument(node: ast.arg, default: ast.expr | None) -> Argument:
    if node.annotation is None:
        raise RequestError(f"the setting '{node.arg}' has no type")
    annotation = _evaluate(node.annotation)
    setting = Setting()
    if typing.get_origin(annotation) is typing.Annotated:
        annotation, *extra = typing.get_args(annotation)
        setting = next((item for item in extra if isinstance(item, Setting)), setting)
    value = REQUIRED if default is None else ast.literal_eval(default)
    return Argument(node.arg, annotation, value, setting)


def _evaluate(node: ast.expr) -> Any:
    """Evaluate an annotation made of builtins, `Annotated`, `Literal` and `Setting`, and of nothing else."""
    code = compile(ast.Expression(node), "<annotation>", "eval")
    return eval(code, {"__builtins__": vars(builtins)}, dict(_ANNOTATION_NAMES))


def optimizer_parts(name: str) -> list[Plugin]:
    """Return the gradient rule and the base update that an optimizer's name composes.

    `sgd` is a base alone (its rule is the plain gradient); `sam-sgd` is the rule `sam` over the base `sgd`.

    Raises:
        RequestError: No such optimizer, with the nearest one there is.
    """
    plugins = listing("optimizer")
    bases = [plugin.name for plugin in plugins.values() if plugin.returns == "Base"]
    rules = [plugin.name for plugin in plugins.values() if plugin.returns == "Rule"]
    names = bases + [f"{rule}-{base}" for rule in rules for base in bases]
    if name in rules:
        raise RequestError(
            f"'{name}' is a gradient rule and needs a base update: {', '.join(f'{name}-{base}' for base in bases)}"
        )
    if name not in names:
        raise RequestError(f"there is no optimizer '{name}'.{nearest(name, names)}")
    return [plugins[part] for part in name.split("-")]


def program_arguments(names: Mapping[str, str]) -> dict[str, Argument]:
    """Return every setting that a model of these plug-ins takes, by name.

    Args:
        names: The values of some or all of `dataset`, `network`, `optimizer`.

    Raises:
        RequestError: One of them does not exist.
    """
    parts = [get("training", "training")]
    for kind, name in names.items():
        parts += optimizer_parts(name) if kind == "optimizer" else [get(kind, name)]
    return {name: argument for part in parts for name, argument in part.arguments.items()}
