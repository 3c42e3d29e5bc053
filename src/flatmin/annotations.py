"""The types of settings, read from source text: nothing that declares a setting is run or imported.

A type is written in place, or is a name for one: given in the same file, or in a file that it is imported from.

    # flatmin/optimizers/arguments.py
    LearningRate = Annotated[float, Setting(about="Learning rate.", gt=0, per_model=True)]

    # flatmin/optimizers/sgd.py
    from flatmin.optimizers.arguments import LearningRate

    def sgd(*, lr: LearningRate = 0.1) -> Base: ...
"""

from __future__ import annotations

import ast
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import util
from pathlib import Path
from typing import Any

from flatmin.errors import RequestError
from flatmin.settings import Setting

_KNOWN: typing.Mapping[str, Any] = {
    **{kind.__name__: kind for kind in (bool, float, int, str, tuple)},
    "Annotated": typing.Annotated,
    "Literal": typing.Literal,
    "Setting": Setting,
}
_PARTS = (
    ast.Name,
    ast.Load,
    ast.Constant,
    ast.Subscript,
    ast.Tuple,
    ast.List,
    ast.BinOp,
    ast.BitOr,
    ast.UnaryOp,
    ast.USub,
    ast.Call,
    ast.keyword,
)
_POSSIBLE = (
    "A type is made of bool, float, int, str, tuple, None, Literal[...] and Annotated[type, Setting(...)], or is a "
    "name for such: `Name = ...` in the same file, or `from module import Name`."
)


class Unreadable(Exception):
    """A type cannot be read; the message is one clause."""


@dataclass(frozen=True)
class Source:
    """One module as its file has it.

    Attributes:
        file: The file.
        module: The name by which it is imported.
    """

    file: Path
    module: str

    @cached_property
    def tree(self) -> ast.Module:
        """The file's syntax tree."""
        return ast.parse(self.file.read_text(encoding="utf-8"), filename=str(self.file))

    def function(self, name: str) -> ast.FunctionDef | None:
        """Return one of the module's functions."""
        found = [node for node in self.tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
        return found[-1] if found else None

    def refusals(self) -> dict[str, str]:
        """Return what the module's plug-in refuses of what others of its kind take, and why: its `REFUSES`.

        Raises:
            RequestError: It is not a plain dictionary of texts.
        """
        written = next((value for node in self.tree.body if (value := _assigned(node, "REFUSES"))), None)
        if written is None:
            return {}
        try:
            found = ast.literal_eval(written)
            return {str(name): str(reason) for name, reason in found.items()}
        except (ValueError, AttributeError):
            raise RequestError(
                f"{self.file}: REFUSES = {ast.unparse(written)} is not a plain dictionary from arguments to reasons"
            ) from None

    def type_of(self, argument: ast.arg) -> Any:
        """Return the type of an argument, `Annotated` where it is declared so.

        Raises:
            RequestError: It has none, or one that cannot be read.
        """
        if argument.annotation is None:
            raise RequestError(f"{self.file}: the setting '{argument.arg}' has no type. {_POSSIBLE}")
        try:
            return self._value(argument.annotation, ())
        except Unreadable as error:
            what = f"the type of the setting '{argument.arg}', {ast.unparse(argument.annotation)}"
            raise RequestError(f"{self.file}: {what}, cannot be read: {error}. {_POSSIBLE}") from None

    def _value(self, node: ast.expr, seen: tuple[tuple[str, str], ...]) -> Any:
        """Evaluate a type made of `_KNOWN`, constants and names for types, and of nothing else."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node = _parsed(node.value)
        names: dict[str, Any] = {}
        for part in ast.walk(node):
            called = isinstance(part, ast.Call) and ast.unparse(part.func) != "Setting"
            if called or not isinstance(part, _PARTS):
                raise Unreadable(
                    f"`{ast.unparse(part) if isinstance(part, ast.expr) else type(part).__name__}` is in it"
                )
            if isinstance(part, ast.Name):
                names[part.id] = _KNOWN[part.id] if part.id in _KNOWN else self._named(part.id, seen)
        try:
            return eval(compile(ast.Expression(node), str(self.file), "eval"), {"__builtins__": {}}, names)
        except Exception as error:
            raise Unreadable(f"{type(error).__name__}: {error}") from None

    def _named(self, name: str, seen: tuple[tuple[str, str], ...]) -> Any:
        """Return the type that a name stands for in this module."""
        place = (self.module, name)
        if place in seen:
            raise Unreadable(f"'{name}' stands for itself")
        for node in _statements(self.tree.body):
            value = _assigned(node, name)
            if value is not None:
                return self._value(value, (*seen, place))
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return self._imported(node, alias.name)._named(alias.name, (*seen, place))
        raise Unreadable(f"'{name}' is neither given in {self.file} nor imported there by `from module import {name}`")

    def _imported(self, node: ast.ImportFrom, name: str) -> Source:
        module = node.module or ""
        if node.level:
            package = self.module.split(".")
            kept = len(package) - node.level + (self.file.name == "__init__.py")
            module = ".".join([*package[:kept], *([module] if module else [])])
        found = source(module)
        if found is None:
            raise Unreadable(f"'{name}' is imported from {module}, whose source file cannot be found")
        return found


@cache
def source(module: str) -> Source | None:
    """Return a module's source file, found without importing it or a package that it lies in."""
    top, *below = module.split(".")
    if top == "flatmin":
        return _within([Path(__file__).parent], below, module)
    try:
        spec = util.find_spec(top)
    except (ValueError, ImportError):
        return None
    if spec is None:
        return None
    if spec.submodule_search_locations is not None:
        return _within([Path(place) for place in spec.submodule_search_locations], below, module)
    origin = spec.origin or ""
    return Source(Path(origin), module) if origin.endswith(".py") and not below else None


def _within(folders: list[Path], below: list[str], module: str) -> Source | None:
    """Return a module's file, looking below the folders of its top package."""
    for folder in folders:
        place = folder.joinpath(*below)
        for file in (place / "__init__.py", place.parent / f"{place.name}.py"):
            if file.is_file() and (below or file.parent == folder):
                return Source(file, module)
    return None


def _parsed(text: str) -> ast.expr:
    try:
        return ast.parse(text, mode="eval").body
    except SyntaxError:
        raise Unreadable(f"'{text}' is not an expression") from None


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements of a module, those under a plain `if` (TYPE_CHECKING) too."""
    for node in body:
        yield node
        if isinstance(node, ast.If):
            yield from _statements(node.body)


def _assigned(node: ast.stmt, name: str) -> ast.expr | None:
    """Return what a statement makes a name stand for, if it does."""
    if isinstance(node, ast.Assign):
        given = any(isinstance(target, ast.Name) and target.id == name for target in node.targets)
        return node.value if given else None
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == name:
        return node.value
    if type(node).__name__ == "TypeAlias" and getattr(node, "name").id == name:  # noqa: B009 (from Python 3.12 on)
        value: ast.expr = getattr(node, "value")  # noqa: B009
        return value
    return None
