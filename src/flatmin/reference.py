"""The reference of all plug-ins and their settings, written from their signatures.

`python -m flatmin.reference` prints it as Markdown: that is docs/settings.md.
"""

from __future__ import annotations

from collections.abc import Iterator

from flatmin.labels import format_value
from flatmin.plugins import FOLDERS, Plugin, listing
from flatmin.settings import REQUIRED, Argument

_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def describe(argument: Argument) -> str:
    """Return a setting's type, bounds, unit, default and meaning as one line.

    >>> from flatmin.plugins import get
    >>> describe(get("optimizer", "sam").arguments["rho"])
    "float >= 0, L2 norm of the weights, default 0.05, per model: Radius of the SAM family's neighbourhood."
    """
    setting = argument.setting
    kind = " ".join([argument.type_name, *(f"{_BOUNDS[name]} {bound:g}" for name, bound in setting.bounds.items())])
    parts = [kind, setting.unit, _default(argument), "per model" if setting.per_model else ""]
    return ", ".join(part for part in parts if part) + (f": {setting.about}" if setting.about else "")


def _default(argument: Argument) -> str:
    if argument.default is REQUIRED:
        return "required"
    return "" if argument.default is None else f"default {format_value(argument.default)}"


def plain() -> str:
    """Return all settings as plain text, for the help of the command line."""
    lines = ["Settings (SETTING=VALUE; models of one stack may differ in those that are per model):"]
    for plugin in _plugins():
        if plugin.kind not in ("measure", "subject"):
            lines += ["", f"{plugin.kind} {plugin.name}: {plugin.about}"]
            lines += [f"  {name}  {describe(argument)}" for name, argument in plugin.arguments.items()]
    return "\n".join(lines)


def markdown() -> str:
    """Return all plug-ins and settings as Markdown."""
    lines = [
        "# Plug-ins and their settings",
        "",
        "Written from the signatures by `python -m flatmin.reference`; a test holds it. Models of one stack may differ",
        "in a setting that is *per model*. An optimizer is a base, or a rule over a base: `sgd`, `sam-sgd`.",
    ]
    for plugin in _plugins():
        role = "" if plugin.kind != "optimizer" else " (rule)" if plugin.returns.endswith("Rule") else " (base)"
        lines += ["", f"## {plugin.kind} `{plugin.name}`{role}", "", plugin.about, ""]
        lines += [f"- `{name}`: {describe(argument)}" for name, argument in plugin.arguments.items()]
        lines += [f"- not `{name}`: {reason}" for name, reason in plugin.refuses.items()]
    return "\n".join(line for line in lines).rstrip().replace("\n\n\n", "\n\n") + "\n"


def _plugins() -> Iterator[Plugin]:
    for kind in FOLDERS:
        yield from listing(kind).values()


if __name__ == "__main__":
    print(markdown(), end="")
