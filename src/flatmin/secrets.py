"""Secrets of the environment, kept out of what is written: rows of failures and logs."""

from __future__ import annotations

import os
import re

HIDDEN = "***"

_NAMES = re.compile(r"SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIAL|ACCESS_KEY|API_KEY|PRIVATE_KEY")
_IN_URL = re.compile(r"(?<=://)[^/\s@'\"]+(?=@)")
_SHORTEST = 8
"""A shorter value is no secret, and would be hidden in words that happen to hold it."""


def without_secrets(text: str) -> str:
    """Return a text without the values of environment variables that are named as secrets, or credentials in a URL.

    >>> without_secrets("s3://AKIA:hush@bucket/x")
    's3://***@bucket/x'
    """
    if "://" in text:
        text = _IN_URL.sub(HIDDEN, text)
    for value in _secrets():
        text = text.replace(value, HIDDEN)
    return text


def _secrets() -> list[str]:
    found = {value for name, value in os.environ.items() if _NAMES.search(name.upper()) and len(value) >= _SHORTEST}
    paths = {value for value in found if os.path.exists(value)}  # GOOGLE_APPLICATION_CREDENTIALS names a file
    return sorted(found - paths, key=len, reverse=True)
