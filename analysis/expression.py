"""Filters such as `train_loss <= 0.01 and optimizer == 'sgd'`: which rows of a table count.

Comparisons (`<`, `<=`, `>`, `>=`, `==`, `!=`, also `0 < rho <= 1`) of a column with a number, a quoted word or another
column, joined by `and`, `or`, `not` and parentheses. A comparison with a null is false. Nothing is evaluated but these.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from flatmin.analysis import frames
from flatmin.analysis.configurations import Bools
from flatmin.errors import RequestError

_OPERATORS: Mapping[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}


def matches(table: pd.DataFrame, expression: str) -> Bools:
    """Tell which rows of a table fulfil a filter.

    Args:
        table: Any table.
        expression: The filter; a column is written as it is, `gen.gap` and `lpf(sigma=0.002)` too, and between
            backticks where that cannot be read, as one with a blank.

    Returns:
        Shape `(rows,)`.

    Raises:
        RequestError: It is no such expression, a column is missing, or a column and a value cannot be compared.

    >>> matches(pd.DataFrame({"train_loss": [0.1, 0.001, None]}), "train_loss <= 0.01").tolist()
    [False, True, False]
    """
    quoted = {f"_column_{place}_": name for place, name in enumerate(re.findall("`([^`]+)`", expression))}
    plain = expression.strip()
    for stand_in, name in quoted.items():
        plain = plain.replace(f"`{name}`", stand_in)
    try:
        tree = ast.parse(plain, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise _wrong(expression, "it cannot be read") from None
    return _Filter(table, expression, plain, quoted).rows(tree.body)


def _wrong(expression: str, reason: str) -> RequestError:
    return RequestError(
        f"filter '{expression}': {reason}. Write a column, one of < <= > >= == !=, and a number or a quoted word, "
        "joined by and, or, not: train_loss <= 0.01."
    )


@dataclass(frozen=True)
class _Filter:
    table: pd.DataFrame
    expression: str
    plain: str  # the expression with stand-ins for what is between backticks
    quoted: Mapping[str, str]

    def rows(self, node: ast.expr) -> Bools:
        if isinstance(node, ast.BoolOp):
            join = np.logical_and if isinstance(node.op, ast.And) else np.logical_or
            return np.asarray(join.reduce([self.rows(value) for value in node.values]))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return ~self.rows(node.operand)
        if not isinstance(node, ast.Compare) or any(type(one) not in _OPERATORS for one in node.ops):
            raise _wrong(self.expression, f"'{self.said(node)}' is no comparison")
        nodes = [node.left, *node.comparators]
        sides = [self.side(one) for one in nodes]
        found = np.ones(len(self.table), dtype=np.bool_)
        for place, one in enumerate(node.ops):
            found &= self.compare(sides[place], _OPERATORS[type(one)], sides[place + 1], self.said(node))
        return found

    def side(self, node: ast.expr) -> Any:
        """A column, or a plain value."""
        name = self.said(node)
        if name in self.table.columns:
            return self.table[name]
        try:
            value = ast.literal_eval(node)
        except ValueError:
            value = None
        if not isinstance(value, bool | int | float | str):
            frames.check_columns(self.table, [name], role=f"filter '{self.expression}'")
        return value

    def compare(self, left: Any, compare: Callable[[Any, Any], Any], right: Any, said: str) -> Bools:
        columns = [side for side in (left, right) if isinstance(side, pd.Series)]
        if not columns:
            raise _wrong(self.expression, f"'{said}' compares two values, and no column")
        try:
            found = compare(left, right).fillna(False)
        except TypeError:
            raise _wrong(self.expression, f"'{said}' compares numbers with something else") from None
        known = [column.notna() for column in columns]
        return np.asarray(np.logical_and.reduce([np.asarray(one, dtype=np.bool_) for one in (found, *known)]))

    def said(self, node: ast.expr) -> str:
        """What was written for a part of the expression."""
        said = ast.get_source_segment(self.plain, node) or ast.unparse(node)
        return self.quoted.get(said, said)
