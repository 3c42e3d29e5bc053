"""The folder is the registry: plug-ins are files, and their settings are read without running them.

A plug-in is a file with one public function of the file's own name, its entry function. Listing reads file
names and source text only, so nothing is imported until a plug-in is used. Another distribution
adds plug-ins through entry points of the groups below.

    [project.entry-points."flatmin.optimizers"]
    lion = "my_package.lion:lion"
"""

from __future__ import annotations

import ast
import importlib
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from flatmin.annotations import Source, source
from flatmin.errors import RequestError, nearest
from flatmin.settings import REQUIRED, Argument, Setting

FOLDERS: Mapping[str, str] = {
    "network": "flatmin.trainables.networks",
    "dataset": "flatmin.trainables.datasets",
    "optimizer": "flatmin.optimizers",
    "measure": "flatmin.sharpness",
    "training": "flatmin.trainables.training",
    "subject": "flatmin.sharpness.subject",
}
"""Where each kind of plug-in lives; `training` is the one loop that all models share, `subject` what every measure
can be asked of."""

GROUPS: Mapping[str, str] = {
    "network": "flatmin.networks",
    "dataset": "flatmin.datasets",
    "optimizer": "flatmin.optimizers",
    "measure": "flatmin.measures",
}

_BASES = ("Base", "SecondOrderBase")
_RULES = ("Rule", "FirstOrderRule")
"""What the entry function of an optimizer's part returns, as annotated; see `flatmin.optimizers.interface`."""


@dataclass(frozen=True)
class Plugin:
    """One plug-in as its source declares it.

    Attributes:
        kind: `network`, `dataset`, `optimizer`, `measure`, `training` or `subject`.
        name: The name in studies, tables and reports.
        module: The module to import when it is used.
        function: The entry function in that module.
        returns: The entry function's return annotation as written (`Base` or `Rule` for optimizers).
        arguments: Its settings by name, in the order of the signature.
        about: The first line of the entry function's docstring.
        refuses: Arguments that others of its kind take and this one does not, with the reasons: `REFUSES` in its file.
    """

    kind: str
    name: str
    module: str
    function: str
    returns: str
    arguments: Mapping[str, Argument]
    about: str
    refuses: Mapping[str, str] = field(default_factory=dict)

    def load(self) -> Callable[..., Any]:
        """Import the plug-in's module and return its entry function."""
        entry: Callable[..., Any] = getattr(importlib.import_module(self.module), self.function)
        return entry


def listing(kind: str) -> dict[str, Plugin]:
    """Return every plug-in of a kind by name: the folder's files first, then entry points."""
    found = dict(_folder(kind))
    if kind in GROUPS:
        for point in _points(metadata.entry_points, GROUPS[kind], tuple(sys.path)):
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
def _points(
    scan: Callable[..., metadata.EntryPoints], group: str, path: tuple[str, ...]
) -> tuple[metadata.EntryPoint, ...]:
    """Return the entry points of a group on a path; a scan reads a file of every distribution that is installed."""
    return tuple(scan(group=group))


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
        module = f"{package}.{file.stem}"
        if module in FOLDERS.values() and module != FOLDERS[kind]:
            continue
        plugin = _read(kind, Source(file, module), file.stem)
        if plugin is not None:
            found[plugin.name] = plugin
    return found


@cache
def _external(kind: str, point: metadata.EntryPoint) -> Plugin:
    found = source(point.module)
    if found is None:
        raise RequestError(f"the entry point {point.name} = {point.value!r} names a module that cannot be found")
    plugin = _read(kind, found, point.attr)
    if plugin is None:
        raise RequestError(f"{point.module} has no function '{point.attr}', which its entry point names")
    return replace(plugin, name=point.name)


def _read(kind: str, file: Source, function: str) -> Plugin | None:
    node = file.function(function)
    if node is None:
        return None
    arguments = {
        written.arg: _argument(file, written, default)
        for written, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
    }
    returns = ast.unparse(node.returns) if node.returns else ""
    about = (ast.get_docstring(node) or "").partition("\n")[0]
    return Plugin(kind, function, file.module, function, returns, arguments, about, file.refusals())


def _argument(file: Source, node: ast.arg, default: ast.expr | None) -> Argument:
    annotation = file.type_of(node)
    setting = Setting()
    if typing.get_origin(annotation) is typing.Annotated:
        annotation, *extra = typing.get_args(annotation)
        setting = next((item for item in reversed(extra) if isinstance(item, Setting)), setting)
    try:
        value = REQUIRED if default is None else ast.literal_eval(default)
    except ValueError:
        raise RequestError(
            f"{file.file}: the default of the setting '{node.arg}', {ast.unparse(default or node)}, is not a plain "
            "value: a number, a text, true, false, none or a tuple of such"
        ) from None
    return Argument(node.arg, annotation, value, setting)


def optimizer_parts(name: str) -> list[Plugin]:
    """Return the gradient rule and the base update that an optimizer's name composes.

    `sgd` is a base alone (its rule is the plain gradient); `sam-sgd` is the rule `sam` over the base `sgd`.

    Raises:
        RequestError: No such optimizer, with the nearest one there is; or a pair that makes no sense, with the reason.
    """
    plugins = listing("optimizer")
    bases = [plugin.name for plugin in plugins.values() if plugin.returns in _BASES]
    rules = [plugin.name for plugin in plugins.values() if plugin.returns in _RULES]
    parts = name.split("-")
    if name in rules:
        raise RequestError(
            f"'{name}' is a gradient rule and needs a base update: "
            + ", ".join(f"{name}-{base}" for base in bases if not _senseless(plugins[name], plugins[base]))
        )
    if len(parts) > 1 and set(parts) <= {*bases, *rules}:
        _refuse_wrong_pair(parts, bases, plugins)
    if parts[0] == "plain":
        raise RequestError(
            f"there is no optimizer '{name}': the plain gradient rule has no name; write the base alone, 'sgd'"
        )
    names = optimizer_names()
    if name not in names:
        raise RequestError(f"there is no optimizer '{name}'.{nearest(name, names)}")
    return [plugins[part] for part in parts]


def optimizer_names() -> list[str]:
    """Return the names of all optimizers: the bases, and every rule over every base that it goes with."""
    plugins = listing("optimizer").values()
    bases = [plugin for plugin in plugins if plugin.returns in _BASES]
    rules = [plugin for plugin in plugins if plugin.returns in _RULES]
    pairs = [f"{rule.name}-{base.name}" for rule in rules for base in bases if not _senseless(rule, base)]
    return [base.name for base in bases] + pairs


def _refuse_wrong_pair(parts: Sequence[str], bases: Sequence[str], plugins: Mapping[str, Plugin]) -> None:
    """Raise a RequestError with the reason where an optimizer's known parts do not go together."""
    *rules, base = parts
    name = "-".join(parts)
    if sum(part in bases for part in parts) != 1:
        found = " and ".join(f"'{part}'" for part in parts)
        raise RequestError(f"'{name}' must have one base update, of {', '.join(bases)}; it has {found}")
    if base not in bases:
        of_them = next(part for part in parts if part in bases)
        rest = [part for part in parts if part != of_them]
        raise RequestError(f"'{name}': the gradient rule comes first: '{'-'.join([*rest, of_them])}'")
    if len(rules) > 1:
        raise RequestError(f"'{name}' has {len(rules)} gradient rules; an optimizer takes one: '{rules[0]}-{base}'")
    reason = _senseless(plugins[rules[0]], plugins[base])
    if reason:
        raise RequestError(f"'{name}' makes no sense: {reason}")


def _senseless(rule: Plugin, base: Plugin) -> str:
    """Return why a rule does not go with a base, or nothing."""
    if rule.returns == "FirstOrderRule" and base.returns == "SecondOrderBase":
        return (
            f"'{base.name}' multiplies by the Hessian of the function whose gradient it is given, "
            f"and the gradient of '{rule.name}' is of a function that has no Hessian-vector products"
        )
    return ""


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
