"""The settings that several networks share, each declared once."""

from __future__ import annotations

from typing import Annotated

from flatmin.settings import Setting

Width = Annotated[int, Setting(about="Size of the network: units, or channels, of a layer.", ge=1)]
LaterWidth = Annotated[int, Setting(about="Size of the network: units, or channels, of a layer.", ge=1, neutral=64)]
"""Of networks that once had 64 channels and no choice."""

Depth = Annotated[
    int,
    Setting(
        about="Layers: hidden ones of an MLP, else those of the network's name (WRN-28-10 has 28).",
        unit="layers",
        ge=1,
    ),
]

Dropout = Annotated[float, Setting(about="Probability of dropping a hidden unit.", unit="probability", ge=0, lt=1)]
