"""The Euclidean norm of all weights, ||w||, not squared, in units of a weight: a control, not a sharpness.

Biases and the normalisation layers' weights count like all others. Source: Jiang et al. 2020 ("Fantastic generalization
measures", parameter norm) and Dziugaite et al. 2020 sum its square; ranks are the same, and means over seeds are less
ruled by their largest. With normalisation layers a network does the same at any scale of what stands before them, so
that there the norm tells more of the learning rate and the weight decay than of the function.
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


def l2_norm(engine: Engine) -> Estimate:
    """Euclidean norm of all trained weights.

    Args:
        engine: The models.
    """
    return exact(engine.params.double().norm(dim=1).cpu(), passes=0.0)
