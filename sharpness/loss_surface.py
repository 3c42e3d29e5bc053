"""A slice of the loss surface through the trained weights, to `spectra/`; its value, the largest rise in it, in nats.

The surface is L(w + x d1 + y d2) on a grid of [-reach, reach] (squared, with two dimensions), kind `surface` with the
columns x, y (null in one dimension) and value. The measure's value is the largest L(w + x d1 + y d2) - L(w) on those
grid points that lie within `reach` of the centre: 0 at least, for the centre is one.

- `directions=random`: Gaussian, then each filter of d scaled to the norm of the filter of w, so that x = 1 is as far as
  the filter is long (filter normalisation; Li et al. 2018, "Visualizing the loss landscape of neural nets"). A filter
  is a slice along the first axis of a parameter with two axes or more. Biases and normalisation layers' weights stay
  where they are, as in their figures; with `move_vectors` each of their entries moves by its own size, up or down.
  Their code without its `ignore` moves these along w itself instead.
- `directions=hessian`: D v for the two largest eigenvalues of D H D, |v| = 1, from the Krylov space that `lambda_max`
  uses; x and y are in units of the metric, and L is about L(w) + g.(x d1 + y d2) + (lambda1 x^2 + lambda2 y^2) / 2.
- `directions=initial`: d1 leads from the trained weights to those that training started from, at x = 1 (Goodfellow,
  Vinyals and Saxe 2015, with the ends exchanged); d2 is a random direction as above. BatchNorm keeps the running
  statistics of the trained weights, so that the loss at x = 1 is not quite the one that training started with.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor

from flatmin.settings import Setting
from flatmin.sharpness.arguments import MetricChoice
from flatmin.sharpness.engine import LOSS_PASSES, PRODUCT_PASSES, Engine
from flatmin.sharpness.estimate import Curve, Estimate
from flatmin.sharpness.lanczos import Directions, top_directions
from flatmin.sharpness.metric import Metric

_EIGENVECTOR_STEPS = 64
_RESIDUAL = 1e-3
"""The residual, as a fraction of its eigenvalue, at which an eigenvector will do for a picture."""

_INSIDE = 1.0 + 1e-9


def loss_surface(
    engine: Engine,
    *,
    dimensions: Annotated[int, Setting(about="A line through the weights (1), or a plane (2).", ge=1, le=2)] = 1,
    directions: Annotated[
        Literal["random", "hessian", "initial"],
        Setting(about="Filter-normalised random ones, the top eigenvectors of the Hessian, or to the initial weights."),
    ] = "random",
    reach: Annotated[
        float, Setting(about="How far the slice goes to either side.", unit="lengths of the direction", gt=0)
    ] = 1.0,
    points_per_axis: Annotated[int, Setting(about="Losses along an axis; one more if even.", ge=3)] = 21,
    move_vectors: Annotated[bool, Setting(about="Move biases and normalisation layers along random directions.")] = (
        False
    ),
    metric: MetricChoice = "filter",
) -> Estimate:
    """Largest rise of the training loss within a slice of its surface, in nats; the slice itself goes to `spectra/`.

    A random direction is one draw, whose luck is not in the stderr, which is 0. `converged` says that the eigenvectors,
    where they are asked for, have been found; else there is no stderr. `samples` are losses and products.

    Args:
        engine: The models.
        dimensions: A line costs `points_per_axis` losses, a plane their square.
        directions: Where the slice goes.
        reach: In units of the directions.
        points_per_axis: How fine.
        move_vectors: Whether biases and normalisation layers' weights move along random directions.
        metric: What scales the Hessian; other directions do not depend on it.

    Raises:
        FlatminError: The slice leads to the initial weights, and they are not known.
    """
    chosen = _directions(engine, directions, dimensions, metric, move_vectors)
    half = points_per_axis // 2
    ticks = torch.arange(-half, half + 1, dtype=torch.float64) / half * reach
    places = torch.cartesian_prod(*[ticks] * dimensions).reshape(-1, dimensions).to(engine.device)
    values = _losses(engine, chosen.vectors, places)
    centre = values[len(places) // 2]
    inside = places.norm(dim=1) <= reach * _INSIDE
    rise = values[inside].amax(dim=0) - centre
    defined = values[inside].isfinite().all(dim=0)
    value, found = torch.where(defined, rise, torch.nan).cpu(), chosen.found.cpu()
    x = places.T[:, None].expand(-1, len(engine), -1).cpu()
    curve = Curve("surface", x[0], values.T.cpu(), x[1] if dimensions == 2 else None)
    products = chosen.products.cpu()
    return Estimate(
        value,
        torch.where(found, 0.0 * value, torch.nan),
        len(places) + products,
        LOSS_PASSES * len(places) + PRODUCT_PASSES * products.double(),
        value.isfinite() & found,
        [curve],
    )


def _directions(engine: Engine, kind: str, dimensions: int, metric: Metric, move_vectors: bool) -> Directions:
    if kind == "hessian":
        return top_directions(engine, metric, dimensions, tolerance=_RESIDUAL, max_steps=_EIGENVECTOR_STEPS)
    vectors = _filter_normalised(engine, dimensions, move_vectors)
    if kind == "initial":
        home = engine.initial_weights().double() - engine.params.double()
        vectors = torch.cat([home[None], vectors[: dimensions - 1]])
    every = torch.ones(len(engine), dtype=torch.bool, device=engine.device)
    return Directions(vectors, every, torch.zeros_like(every, dtype=torch.int64))


def _filter_normalised(engine: Engine, count: int, move_vectors: bool) -> Tensor:
    """Return random directions `[count, K, d]` whose filters have the norms of the weights' filters."""
    network, drawn = engine.network, engine.vectors("normal", "surface", 0, count)
    weights, directions = network.views(engine.params.double()), network.views(drawn.flatten(0, 1))
    parts = []
    for name, shape in zip(network.names, network.shapes, strict=True):
        w, d = (views[name].reshape(len(views[name]), *shape[:1], -1) for views in (weights, directions))
        d = d.reshape(count, len(engine), *w.shape[1:])
        norm = d.norm(dim=-1, keepdim=True)
        scaled = torch.where(norm > 0, d / norm, 0.0) * w.norm(dim=-1, keepdim=True)
        moves = len(shape) > 1 or move_vectors
        parts.append((scaled if moves else torch.zeros_like(scaled)).flatten(2))
    return torch.cat(parts, dim=2)


def _losses(engine: Engine, directions: Tensor, places: Tensor) -> Tensor:
    """Return the losses `[P, K]` at places `[P, dimensions]` in the span of directions `[dimensions, K, d]`."""
    parts = []
    for start, size in engine.portions(0, len(places)):
        moves = torch.einsum("pj,jkd->pkd", places[start : start + size], directions)
        parts.append(engine.losses_at(moves))
    return torch.cat(parts)
