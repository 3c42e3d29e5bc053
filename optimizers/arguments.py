"""The settings that several optimizers share, each declared once."""

from __future__ import annotations

from typing import Annotated

from flatmin.settings import Setting

LearningRate = Annotated[float, Setting(about="Learning rate.", gt=0, per_model=True)]
WeightDecay = Annotated[float, Setting(about="Weight decay coefficient.", ge=0, per_model=True)]
Beta1 = Annotated[float, Setting(about="Decay of the mean of gradients.", ge=0, lt=1, per_model=True)]
Beta2 = Annotated[float, Setting(about="Decay of the mean of squared gradients.", ge=0, lt=1, per_model=True)]
Rho = Annotated[
    float,
    Setting(about="Radius of the SAM family's neighbourhood.", unit="L2 norm of the weights", ge=0, per_model=True),
]
