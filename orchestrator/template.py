"""A study to begin with: a commented one, or a copy of another under a new name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from flatmin.errors import RequestError
from flatmin.orchestrator.document import parse, text_of
from flatmin.orchestrator.schema import SCHEMA_FILE
from flatmin.orchestrator.study import builtin_names, find, read_study
from flatmin.orchestrator.study_file import NAME

_TEMPLATE = """\
# A study: everything with one value is a setting, everything with several an axis.
# The grid is the product of the axes and the seeds: 2 optimizers x 2 learning rates x 3 seeds = 12 models.
# What there is to set: `flatmin-sweep plan --help`. How studies are written: docs/studies.md.
study: my-study
about: Does SAM find flatter minima, and do they generalise better?
source: ""                        # paper, section, table; or yourself

settings:
  dataset: digits                 # 1,000 training and 797 test images of 8 x 8 pixels; nothing is downloaded
  network: mlp
  width: 64                       # hidden units
  label_noise: 0.1                # share of the training labels that are replaced by random ones
  batch_size: 100
  epochs: 30
  # stop_loss: 0.01               # a model whose training loss is this small has converged, and stops
  # eval_every: 5                 # rows of the table `epochs`: every 5th epoch

axes:
  optimizer: [sgd, sam-sgd]       # a base, or a gradient rule over a base
  lr: [0.03, 0.1]

# cases:                          # several grids in one study; each lies over the settings and axes above
#   - settings: {optimizer: sgd}
#   - settings: {optimizer: sam-sgd}
#     axes: {rho: [0.02, 0.05]}

seeds: 3                          # 0, 1, 2; or a list of them
measures: [lpf, lambda_max, hessian_trace]
# measure_every: 10               # at every 10th epoch too, not at the end alone

# resources: {models_per_trial: 6}   # models trained together, at most; beside: cpus_per_trial, gpus_per_trial

small:                            # what `--small` runs: a minute, to see that everything works
  settings: {epochs: 3}
  axes: {optimizer: [sgd, sam-sgd], lr: [0.1]}
  seeds: 1
"""


def new_study(name: str, source: str | None = None, folder: str | Path = ".") -> Path:
    """Write a study that plans as it stands; what is there is never overwritten.

    Where `study.schema.json` (`flatmin-sweep schema -o study.schema.json`) lies beside it, the first line says so to
    editors.

    Args:
        name: Its name; the file is the name and `.yaml`.
        source: A built-in study, or the path of a YAML file, whose text is copied with its comments; a small study of
            the digits when None.
        folder: Where to write it.

    Returns:
        The file.

    Raises:
        RequestError: The name cannot be used, the file is there or cannot be written, or `source` is no study.
    """
    _check_name(name)
    text = _TEMPLATE
    if source is not None:
        read_study(source)
        text = text_of(*find(source))
    file = Path(folder) / f"{name}.yaml"
    try:
        with file.open("x", encoding="utf-8") as handle:
            handle.write(_modeline(text, file.parent) + _renamed(text, name))
    except FileExistsError:
        raise RequestError(f"'{file}' is there already, and nothing is overwritten; choose another name") from None
    except OSError as error:
        raise RequestError(f"'{file}' cannot be written: {error.strerror}") from None
    return file


def _check_name(name: str) -> None:
    if name in builtin_names():
        raise RequestError(f"'{name}' is a built-in study; choose another name, so that results tell them apart")
    if re.fullmatch(NAME, name):
        return
    possible = re.sub(r"[^a-z0-9_]+", "-", re.sub(r"\.ya?ml$", "", name.rpartition("/")[2].lower())).strip("-_")
    raise RequestError(
        f"'{name}': a study's name is lower-case letters, digits, - and _, and begins with a letter or digit."
        + (f" Did you mean '{possible}'?" if possible else "")
    )


def _modeline(text: str, folder: Path) -> str:
    """Return the line that tells yaml-language-server of the schema, where there is one and the text does not."""
    known = "yaml-language-server:" in text or not (folder / SCHEMA_FILE).is_file()
    return "" if known else f"# yaml-language-server: $schema={SCHEMA_FILE}\n"


def _renamed(text: str, name: str) -> str:
    """Return the text of a study with another name, every other character as it was."""
    root: Any = yaml.compose(text, Loader=yaml.SafeLoader)
    value = next(value for key, value in root.value if key.value == "study")
    written = name if isinstance(parse(name, "").data, str) else f'"{name}"'  # a name such as 1e3, or true
    return text[: value.start_mark.index] + written + text[value.end_mark.index :]
