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

Sigma = Annotated[float, Setting(about="Standard deviation of the weight noise.", unit="units of the metric", gt=0)]

Radius = Annotated[float, Setting(about="Radius of the ball around the weights.", unit="units of the metric", gt=0)]

Gamma = Annotated[
    float, Setting(about="Strength of the pull to the weights.", unit="1 / squared unit of the metric", gt=0)
]

Steps = Annotated[int, Setting(about="Steps of a climb or of a chain.", unit="steps", ge=1)]

ExamplesPerBatch = Annotated[
    int | None,
    Setting(
        about="Average over random batches of so many examples, each measured by itself; none is the whole set.",
        unit="examples",
        ge=1,
    ),
]

NormaliseLogits = Annotated[
    bool, Setting(about="Whether the logits of an example lose their mean and are divided by their norm.")
]

Epsilon = Annotated[float, Setting(about="Rise of the loss that is looked for.", unit="nats", gt=0)]

Published = Annotated[
    bool, Setting(about="As the published code computes it, where that is not what its formula says.")
]
