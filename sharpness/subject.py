"""The arguments that every measure takes beside its own: which examples, and which loss.

They are read from this signature, written into labels as any other (`lpf(data=test, subset=2000)`) and applied to the
engine before a measure sees it, so that no measure has to know them.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

from flatmin.errors import RequestError
from flatmin.settings import Setting
from flatmin.sharpness.engine import Engine
from flatmin.sharpness.losses import NAMED, cross_entropy


def subject(
    engine: Engine,
    *,
    data: Annotated[
        Literal["train", "val", "test"], Setting(about="The set over whose examples the loss is taken.")
    ] = "train",
    subset: Annotated[
        int | None,
        Setting(
            about="Take so many examples of the set, drawn at random; their sampling error is in the stderr.",
            unit="examples",
            ge=64,
        ),
    ] = None,
    loss: Annotated[
        Literal["own", "cross_entropy", "squared_error"],
        Setting(about="The loss; `own` is the cross-entropy in a study, and from Python the one that was given."),
    ] = "own",
    label_smoothing: Annotated[
        float, Setting(about="Share of the target spread over all classes, in a cross-entropy.", ge=0, lt=1)
    ] = 0.0,
) -> Engine:
    """What every measure can be asked of, beside its own arguments.

    Args:
        engine: The models.
        data: The set.
        subset: How many of its examples; all of them by default, and where it has no more.
        loss: The loss.
        label_smoothing: The cross-entropy's smoothing.

    Raises:
        RequestError: Smoothing of a loss that is no cross-entropy.
        FlatminError: There is no such set, or the loss does not go with the outputs.
    """
    chosen = engine.on(data)
    function = engine.loss if loss == "own" else NAMED[loss]
    if label_smoothing > 0:
        if function is not cross_entropy:
            raise RequestError("label_smoothing goes with a cross-entropy; write loss=cross_entropy, or leave it out")
        function = partial(cross_entropy, label_smoothing=label_smoothing)
    if function is not engine.loss:
        chosen = chosen.with_loss(function)
    return chosen if subset is None else chosen.sample(subset)
