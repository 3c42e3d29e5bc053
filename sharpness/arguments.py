"""The settings that several measures take, declared once.

A measure's file imports what it needs, `from flatmin.sharpness.arguments import MetricChoice`, and writes
`metric: MetricChoice = "filter"`. The listing reads this file's source and never imports it.
"""

from __future__ import annotations

from typing import Annotated, Literal

from flatmin.settings import Setting

MetricChoice = Annotated[
    Literal["identity", "filter", "element"], Setting(about="In which units weights are displaced.")
]

Tolerance = Annotated[
    float,
    Setting(about="Standard error or error bound at which to stop.", unit="fraction of the value", gt=0),
]

MaxSamples = Annotated[int, Setting(about="Most losses or Hessian-vector products of a model.", ge=2)]
