"""Shannon entropy: how unsure the network is of the training examples, in nats.

shannon_entropy = -(1/n) sum_i sum_c p_ic log p_ic, p = softmax of the outputs: 0 where it is certain of all, log C
where it knows nothing. Deterministic. Source: Bisla et al. 2022, section 3 (after Pereyra et al. 2017); it looks at
no neighbourhood of the weights, and is among the measures because theirs hold it.
"""

from __future__ import annotations

from flatmin.sharpness.engine import LOSS_PASSES, Engine
from flatmin.sharpness.estimate import Estimate, exact_by_part
from flatmin.sharpness.outputs import entropy

REFUSES = {
    "loss": "it is a function of the outputs, and no loss has a part in it",
    "label_smoothing": "it is a function of the outputs, and no label has a part in it",
}


def shannon_entropy(engine: Engine) -> Estimate:
    """Mean entropy of the predicted classes over the training set, in nats.

    Args:
        engine: The models.
    """
    return exact_by_part(engine.means(engine.per_example(entropy)), passes=LOSS_PASSES)
