"""The spectrum of what a network has learned: its outputs and the targets, Fourier-transformed along the inputs.

    F(k) = 1/n sum_i y_i exp(-2 pi i k x_i),    Delta F_k = |F_pred(k) - F_true(k)| / |F_true(k)|,

for k = 0, 1, ..., `frequencies` cycles over the range of the inputs, low to high, by a non-uniform fast Fourier
transform (finufft). The value is the mean of Delta F_k over those k at which the targets have a part. A regression on a
uniform grid of one input gets its discrete Fourier transform.

- x_i is the projection of input i, as the network sees it, on the first principal component of those that are measured,
  put into [-1/2, 1/2): from the smallest on, over the range and one mean distance more.
- y_i is the output of a regression; the number of the predicted class against that of the target, as published, though
  classes have no order; and of a segmentation the projection of the predicted mask on the first principal component of
  the true ones.

Curves of kind `fourier` in `spectra/`, x = k: `part=amplitude`, |F_pred(k)|, twice that for k > 0, so that a sine of
amplitude 1 gives 1; `part=ratio`, |F_pred(k)| / |F_true(k)|; `part=error`, Delta F_k; the last two where |F_true(k)| is
not 0. With `published`, x is an index i from 0 to `frequencies` - 1 that stands for k = i - `frequencies` cycles per
unit of the projection: the axis is reversed, without k = 0, and not scaled to the inputs, and masks lose their mean.

A control, not a sharpness. Source: aryol/CS-439-project (EPFL), image_classification and image_segmentation; Xu et al.
2019; Rahaman et al. 2019.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated

import finufft
import torch
from torch import Tensor

from flatmin.errors import RequestError
from flatmin.settings import Setting
from flatmin.sharpness.arguments import Published
from flatmin.sharpness.engine import LOSS_PASSES, Engine
from flatmin.sharpness.estimate import Curve, Estimate, exact
from flatmin.sharpness.principal import first_component

REFUSES = {
    "subset": "it takes one pass, and a few examples have another spectrum than all of them",
    "loss": "it is a property of the outputs, whatever the loss",
    "label_smoothing": "it is a property of the outputs, whatever the loss",
}

_PRECISION = 1e-12
_NOTHING = 1e-5
"""A coefficient below this share of the targets' root mean square is rounding, for they may be float32."""


def fourier(
    engine: Engine,
    *,
    frequencies: Annotated[
        int, Setting(about="The highest frequency.", unit="cycles over the range of the inputs", ge=1)
    ] = 10,
    published: Published = False,
) -> Estimate:
    """Mean relative error of the outputs' Fourier coefficients; the spectrum as curves.

    Outputs that are not finite have no value, and neither have targets that are all 0.

    Args:
        engine: The models.
        frequencies: How many frequencies there are beside 0.
        published: Whether the axis is the published one.

    Raises:
        RequestError: Inputs that are no numbers or all alike; targets that are neither one number per example, nor one
            class, nor a mask; or outputs that do not fit them.
    """
    about: _Examples = engine.of_examples(
        ("fourier", frequencies, published), lambda: _examples(engine, frequencies, published)
    )
    outputs = engine.per_example(lambda outputs, targets: about.signal.predicted(outputs, targets)).cpu()
    found, size = about.transform(outputs), about.true.abs()
    there = size > _NOTHING * about.scale[:, None]
    sides = torch.where(about.k == 0, 1.0, 2.0)
    ratio, error = (torch.where(there, part.abs() / size, torch.nan) for part in (found, found - about.true))
    x = (about.k + frequencies if published else about.k).double().expand(len(engine), -1)
    parts = {
        "amplitude": (x, sides * found.abs()),
        "ratio": (torch.where(there, x, torch.nan), ratio),
        "error": (torch.where(there, x, torch.nan), error),
    }
    value = torch.where(there, error, 0.0).sum(dim=1) / there.sum(dim=1)
    curves = [Curve("fourier", at, values, settings={"part": part}) for part, (at, values) in parts.items()]
    return replace(exact(value, passes=LOSS_PASSES), curves=curves)


@dataclass(frozen=True)
class _Signal:
    """What is transformed: a number for each example.

    Attributes:
        kind: `value`, `class` or `mask`.
        component: What masks are projected on, `[pixels]`.
        origin: The projection that is taken away.
    """

    kind: str
    component: Tensor | None = None
    origin: float = 0.0

    def predicted(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the number of each example, `[n]`, from outputs `[n, ...]`; NaN where they are not finite."""
        values = self.kind == "value"
        wanted = list(targets.shape[1:] if values else (max([2, *outputs.shape[1:2]]), *targets.shape[1:]))
        if list(outputs.shape[1:]) != wanted:
            raise RequestError(
                f"the spectrum of targets {list(targets.shape[1:])} needs outputs {wanted} of an example"
                f"{'' if values else ', or of more classes'}; got {list(outputs.shape[1:])}"
            )
        finite = outputs.flatten(1).isfinite().all(dim=1)
        return torch.where(finite, self.true(outputs if values else outputs.argmax(dim=1)), torch.nan)

    def true(self, targets: Tensor) -> Tensor:
        """Return the number of each example, `[n]`, from numbers, classes or masks `[n, ...]`."""
        flat = targets.reshape(len(targets), -1).double()
        return flat[:, 0] if self.component is None else flat @ self.component - self.origin


@dataclass(frozen=True)
class _Examples:
    """What of a spectrum does not depend on the weights.

    Attributes:
        signal: How outputs become numbers.
        places: Where the examples are, in cycles at k = 1, `[1, n]`, or `[K, n]` where models see different inputs.
        k: The frequencies, `[P]`, consecutive.
        true: Coefficients of the targets, complex `[K, P]`.
        scale: Root mean square of the targets, `[K]`.
    """

    signal: _Signal
    places: Tensor
    k: Tensor
    true: Tensor
    scale: Tensor

    def transform(self, signals: Tensor) -> Tensor:
        """Return the coefficients `[K, P]` of signals `[K, n]`; NaN where one is not finite."""
        return _transform(self.places, signals, self.k)


def _examples(engine: Engine, frequencies: int, published: bool) -> _Examples:
    signal = _signal(engine, published)
    targets = torch.cat([torch.stack([signal.true(own) for own in batch.y]) for batch in engine.batches], dim=1).cpu()
    places = _places(engine, published)
    k = torch.arange(-frequencies, 0) if published else torch.arange(frequencies + 1)
    return _Examples(signal, places, k, _transform(places, targets, k), targets.square().mean(dim=1).sqrt())


def _signal(engine: Engine, published: bool) -> _Signal:
    y = engine.batches[0].y
    if y.is_floating_point():
        if math.prod(y.shape[2:]) != 1:
            raise RequestError(f"a spectrum needs one number or one class of an example, or a mask; got {y.shape[2:]}")
        return _Signal("value")
    if y.dim() == 2:
        return _Signal("class")
    if not all(bool((batch.y == batch.y[:1]).all()) for batch in engine.batches):
        raise RequestError("the models have different masks, so that they have no spectrum together")
    component, mean = first_component(lambda: (batch.y[0] for batch in engine.batches))
    return _Signal("mask", component, float(component @ mean) if published else 0.0)


def _places(engine: Engine, published: bool) -> Tensor:
    """Return where the examples are along the axis, in cycles at k = 1, `[1, n]` or `[K, n]`."""
    shared = all(batch.shared for batch in engine.batches)
    rows = []
    for model in range(1 if shared else len(engine)):

        def inputs(model: int = model) -> Iterator[Tensor]:
            return (batch.x if batch.shared else batch.x[model] for batch in engine.batches)

        if not next(inputs()).is_floating_point():
            raise RequestError("a spectrum needs inputs that are numbers, to have an axis")
        if not all(bool(x.isfinite().all()) for x in inputs()):
            raise RequestError("a spectrum needs inputs that are finite, to have an axis")
        component, mean = first_component(inputs)
        along = torch.cat([(x.flatten(1).double() - mean) @ component for x in inputs()]).cpu()
        reach = float(along.max() - along.min())
        if not 0 < reach < math.inf:
            raise RequestError("a spectrum needs inputs that are not all alike, to have an axis")
        period = reach * len(along) / (len(along) - 1)
        rows.append(along if published else (along - along.min()) / period - 0.5)
    return torch.stack(rows)


def _transform(places: Tensor, signals: Tensor, k: Tensor) -> Tensor:
    most = int(k.abs().max())
    bad = ~signals.isfinite().all(dim=1)
    strengths = torch.where(bad[:, None], 0.0, signals).to(torch.complex128)
    angles = 2 * math.pi * (places - places.round())
    together = [slice(None)] if len(places) == 1 else [slice(row, row + 1) for row in range(len(places))]
    found = [
        torch.from_numpy(
            finufft.nufft1d1(
                at.numpy(), strengths[rows].numpy(), 2 * most + 1, eps=_PRECISION, isign=-1, nthreads=1
            ).reshape(-1, 2 * most + 1)
        )
        for at, rows in zip(angles, together, strict=True)
    ]
    coefficients = torch.cat(found)[:, k + most] / signals.shape[1]
    return torch.where(bad[:, None], torch.nan, coefficients)
