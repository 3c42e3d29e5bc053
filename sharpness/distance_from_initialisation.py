"""The distance that training went, ||w - w0||, not squared, in units of a weight: a control, not a sharpness.

w0 are the weights that training started from, biases and normalisation layers included. Source: Neyshabur et al. 2017;
Nagarajan and Kolter 2019; Jiang et al. 2020 and Dziugaite et al. 2020 (Frobenius distance, squared there: same ranks).
"""

from __future__ import annotations

from flatmin.sharpness.engine import Engine
from flatmin.sharpness.estimate import Estimate, exact

REFUSES = {
    "data": "it is a norm of the weights, and looks at no example",
    "subset": "it is a norm of the weights, and looks at no example",
    "loss": "it is a norm of the weights, whatever the loss",
    "label_smoothing": "it is a norm of the weights, whatever the loss",
}


def distance_from_initialisation(engine: Engine) -> Estimate:
    """Euclidean distance of the trained weights from those that training started from.

    Args:
        engine: The models.

    Raises:
        FlatminError: The initial weights are not known.
    """
    moved = engine.params.double() - engine.initial_weights().double()
    return exact(moved.norm(dim=1).cpu(), passes=0.0)
