"""A random number: what a measure that knows nothing looks like in a correlation study.

random ~ N(0, 1), a pure number: a hash of the weights and of the model's stream, so that every model has its own. It
costs nothing, repeats itself, and has no relation to how the model generalises. Where a study finds that other measures
correlate with generalisation hardly better than this one, they do not.
"""

from __future__ import annotations

import hashlib

import torch
from torch.func import vmap

from flatmin.sharpness.engine import Engine
from flatmin.sharpness.estimate import Estimate, exact
from flatmin.stack import Streams, normal, stream_key

REFUSES = {
    "data": "it looks at no example",
    "subset": "it looks at no example",
    "loss": "it looks at no loss",
    "label_smoothing": "it looks at no loss",
}


def random(engine: Engine) -> Estimate:
    """A standard normal number from the model's stream: a control.

    Args:
        engine: The models.
    """
    of_weights = [stream_key(hashlib.blake2b(weights.cpu().numpy().tobytes()).hexdigest()) for weights in engine.params]
    tags = engine.keys ^ stream_key("random measure") ^ torch.tensor(of_weights, device=engine.device)
    keys = Streams(tags).keys
    drawn: torch.Tensor = vmap(lambda key: normal(key, (1,)))(keys)
    undefined = ~engine.params.isfinite().all(dim=1)  # as all other measures are, which this one is compared with
    return exact(drawn[:, 0].masked_fill(undefined, torch.nan).cpu(), passes=0.0)
