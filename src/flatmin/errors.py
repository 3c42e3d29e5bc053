"""Errors for people: what was given, where, what is possible.

FlatminError
├── RequestError       the request is wrong; the command line exits with 2 and no traceback
│   └── StudyError     all that is wrong with one study, collected
├── ResultsError       a results directory cannot be used as asked
├── ModelsFailed       some models of a trial have failed; the others are committed
├── DataError          a data set cannot be read: a file is damaged, or not what it should be
│   └── MissingData    its files are not there
└── LeaseLost          another driver owns the results now; this process may not commit
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping


class FlatminError(Exception):
    """Base of every error this package raises on purpose."""


class RequestError(FlatminError):
    """The request is wrong: a name, a value or a path that cannot be used."""


class StudyError(RequestError):
    """Everything that is wrong with one study, one line per mistake."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


class ResultsError(RequestError):
    """A results directory is missing, of another study, of an older schema, or cannot be written."""


class DataError(FlatminError):
    """A data set cannot be read.

    Args:
        found: What is wrong: the file, what is in it, and what should be.
        mend: What to do about it.
    """

    def __init__(self, found: str, mend: str) -> None:
        self.found, self.mend = found, mend
        super().__init__(found, mend)

    def __str__(self) -> str:
        return f"{self.found}; {self.mend}"


class MissingData(DataError):
    """The files of a data set are not there."""


COMES_AGAIN = (RequestError, DataError)
"""Errors that come again however often the same work is tried."""


class LeaseLost(FlatminError):
    """Another driver took the results over, so this process must not write them."""


class ModelsFailed(FlatminError):
    """Some models of a trial have failed, each alone, and the others are committed.

    Args:
        of_model: By model_id, the error in one line and its traceback.
    """

    def __init__(self, of_model: Mapping[str, tuple[str, str]]) -> None:
        self.of_model = dict(of_model)
        super().__init__(self.of_model)

    def __str__(self) -> str:
        first, (line, _) = next(iter(self.of_model.items()))
        more = f", and {len(self.of_model) - 1} more models failed" if len(self.of_model) > 1 else ""
        return f"model {first}: {line}{more}"


class RequestWarning(UserWarning):
    """The request can be carried out, and some of what comes out says less than it seems to."""


class CorruptFileWarning(UserWarning):
    """A file of a results directory cannot be read; it is left out."""


def nearest(given: str, valid: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?`, or the list of valid names when none is close.

    >>> nearest("samm", ["sam", "sgd"])
    " Did you mean 'sam'?"
    >>> nearest("zzz", ["sam", "sgd"])
    ' Valid: sam, sgd.'
    """
    names = sorted(valid)
    close = closest(given, names)
    if close is not None:
        return f" Did you mean '{close}'?"
    return f" Valid: {', '.join(names)}." if names else ""


def closest(given: str, valid: Iterable[str]) -> str | None:
    """Return the valid name that one comes nearest to, as it is written or in lower case, or None.

    >>> closest("LPF", ["lpf", "random"])
    'lpf'
    """
    names = sorted(valid)
    for written in (given, given.lower()):
        if close := difflib.get_close_matches(written, names, n=1):
            return close[0]
    return None


def error_line(error: BaseException) -> str:
    """Return what an error says: its message where it is one for people, else its type and its message's last line."""
    text = str(error).strip()
    if isinstance(error, FlatminError):
        return text
    return f"{type(error).__name__}: {text.splitlines()[-1]}" if text else type(error).__name__
