"""The arguments that every measure takes beside its own: which examples, and which loss.

They are read from this signature, written into labels as any other (`lpf(data=test, subset=2000)`) and applied to the
engine before a measure sees it, so that no measure has to know them.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

from torch import Tensor

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
    subset_stratified: Annotated[
        bool,
        Setting(
            about="Whether the subset is drawn evenly over examples sorted by their loss, which takes a pass.",
            neutral=False,
        ),
    ] = False,
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
        subset_stratified: Whether they are stratified by their loss at the weights.
        loss: The loss.
        label_smoothing: The cross-entropy's smoothing.

    Raises:
        RequestError: Smoothing of a loss that is no cross-entropy, or a stratified subset of what is none, or of
            examples of which only a part is there.
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
    if not subset_stratified:
        return chosen if subset is None else chosen.sample(subset)
    if subset is None:
        raise RequestError(
            "subset_stratified=true says how a subset is drawn; write subset=2000 as well, or leave it out"
        )
    if chosen.is_subset:
        raise RequestError(
            f"subset_stratified=true needs the loss of all {chosen.population} examples, of which {chosen.n_examples} "
            "are in memory; leave it out"
        )
    return chosen.sample(subset, by=_losses_of_examples(chosen))


def _losses_of_examples(engine: Engine) -> Tensor:
    made: Tensor = engine.shared("losses of examples", lambda: engine.per_example(engine.loss))
    return made
