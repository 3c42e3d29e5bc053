"""eps-sharpness: the inverse of the distance along the gradient at which the loss has risen by epsilon.

eps_sharpness = 1 / t with L(w + D t n) - L(w) = epsilon, n = D grad / ||D grad||, in inverse units of the
metric: t is the distance as the balanced network sees it. Source: Bisla et al. 2022, section 3 (epsilon =
0.1, 1 / (eta ||grad||) with a bisection for eta); on quadratics at their minimum, where there is no gradient, their
supplement C takes n along the eigenvector of the largest eigenvalue of D H D.

Where the loss crosses more than once, the crossing found is one before the first doubling of t that lies
above: t starts at half of what the quadratic model of the loss along n predicts.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import elementwise

from flatmin.errors import RequestError
from flatmin.settings import Setting
from flatmin.sharpness.arguments import Epsilon, MetricChoice, Tolerance
from flatmin.sharpness.engine import GRADIENT_PASSES, LOSS_PASSES, PRODUCT_PASSES, Engine
from flatmin.sharpness.estimate import Estimate
from flatmin.sharpness.lanczos import top_directions
from flatmin.sharpness.metric import Metric

REFUSES = {
    "subset": "near a minimum the gradient of a few examples is mostly sampling noise, and its direction is followed",
}
"""At trained tanh networks the interval of a subset of a half held the whole set's value in 1 of 100 draws."""

_MOST_DOUBLINGS = 64
_EIGENVECTOR_STEPS = 100
_TOO_FAR = 1e3
_GLANCED_AT = 256
"""Examples whose curvature along the line says where the search begins: of all it would cost as much as the search."""


def eps_sharpness(
    engine: Engine,
    *,
    epsilon: Epsilon = 0.1,
    direction: Annotated[
        Literal["gradient", "top_eigenvector"],
        Setting(
            about="Along the gradient, or the eigenvector of the Hessian's largest eigenvalue.", neutral="gradient"
        ),
    ] = "gradient",
    metric: MetricChoice = "filter",
    tolerance: Tolerance = 0.001,
) -> Estimate:
    """Inverse distance along the gradient at which the training loss has risen by epsilon.

    Deterministic: `stderr` is the width that the root finder's bracket leaves. A zero gradient, a loss that
    is not finite, or one that never rises by epsilon make it undefined; a loss beyond w that is not finite
    is too far, and a search that ends between a finite and such a loss finds nothing. `samples` are losses
    along the line.

    Args:
        engine: The models.
        epsilon: The rise.
        direction: Where the line goes. An eigenvector points uphill, and is found once its residual is a `tolerance` of
            its eigenvalue; where 100 steps do not do, the value has not converged.
        metric: What scales the gradient and the step.
        tolerance: Width of the bracket at which a model's search stops, as a fraction of the value.
    """
    line = _Line(engine, metric, epsilon, direction, tolerance)
    start, defined = line.first_guess()
    low, high, found = _bracket(line, start, defined)
    rows = np.flatnonzero(found)
    value, stderr = (np.full(len(engine), np.nan) for _ in range(2))
    converged = np.zeros(len(engine), dtype=bool)
    if len(rows):
        root = elementwise.find_root(
            line.rise,
            (low[rows], high[rows]),
            args=(rows,),
            tolerances={"xrtol": tolerance / 2, "xatol": 0.0},
        )
        real = np.maximum(*root.f_bracket) < _TOO_FAR * epsilon
        width = np.where(root.f_x == 0, 0.0, np.abs(root.bracket[1] - root.bracket[0]))
        value[rows] = np.where(real, 1.0 / root.x, np.nan)
        stderr[rows] = np.where(real, width / root.x**2, np.nan)
        converged[rows] = real & root.success & line.found[rows]
    passes = LOSS_PASSES * (1 + line.evaluations) + GRADIENT_PASSES + PRODUCT_PASSES * line.products
    made = (value, stderr, line.evaluations, passes.astype(float), converged)
    value_k, stderr_k, samples_k, passes_k, converged_k = (torch.from_numpy(array) for array in made)
    return Estimate(value_k, stderr_k, samples_k, passes_k, converged_k)


class _Line:
    """The loss of every model along its own direction, less what it should have risen by."""

    def __init__(self, engine: Engine, metric: Metric, epsilon: float, direction: str, tolerance: float) -> None:
        self.engine, self.epsilon = engine, epsilon
        d, gradient = engine.scale(metric), engine.gradient()
        self.found = np.ones(len(engine), dtype=bool)
        self._few = _at_a_glance(engine)
        self.products = np.full(len(engine), self._few.n_examples / engine.n_examples)
        if direction == "gradient":
            self.slope = (d * gradient).norm(dim=1)
            self.direction = d * (d * gradient / self.slope[:, None])
            self.defined = (self.slope > 0) & self.slope.isfinite()
        else:
            top = top_directions(engine, metric, 1, tolerance=tolerance, max_steps=_EIGENVECTOR_STEPS)
            slope = (top.vectors[0] * gradient).sum(dim=1)
            self.slope, self.direction = slope.abs(), torch.where(slope < 0, -1.0, 1.0)[:, None] * top.vectors[0]
            self.defined = self.direction.isfinite().all(dim=1)
            self.found, self.products = top.found.cpu().numpy(), self.products + top.products.cpu().numpy()
        self.base = engine.losses()
        self.evaluations = np.zeros(len(engine), dtype=np.int64)

    def first_guess(self) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Return half the distance that the quadratic model predicts, and for which models there is one."""
        defined = self.defined & self.base.isfinite()
        along = torch.where(defined[:, None], self.direction, 0.0)
        curvature = (along * self._few.hvp(along, defined)).sum(dim=1).clamp(min=0.0).nan_to_num(0.0, posinf=0.0)
        distance = 2 * self.epsilon / (self.slope + (self.slope**2 + 2 * self.epsilon * curvature).sqrt())
        guess = torch.where(defined, distance / 2, 1.0)
        return guess.cpu().numpy(), (defined & guess.isfinite()).cpu().numpy()

    def rise(self, distance: NDArray[np.float64], rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return L(w + D t n) - L(w) - epsilon for some of the models; too far where it is not finite."""
        t = torch.zeros(len(self.engine), dtype=torch.float64)
        active = torch.zeros(len(self.engine), dtype=torch.bool)
        t[rows], active[rows] = torch.from_numpy(np.asarray(distance, dtype=float)), True
        device = self.engine.device
        moves = torch.where(active.to(device)[:, None], t.to(device)[:, None] * self.direction, 0.0)
        losses = self.engine.losses_at(moves[None], active.to(device))[0]
        self.evaluations[rows] += 1
        above: NDArray[Any] = (losses - self.base - self.epsilon)[active.to(device)].cpu().numpy()
        return np.where(np.isfinite(above), above, _TOO_FAR * self.epsilon)


def _at_a_glance(engine: Engine) -> Engine:
    """Return an engine on a few of the examples; on all where they differ in shape and cannot be drawn from."""
    try:
        return engine.sample(_GLANCED_AT)
    except RequestError:
        return engine


def _bracket(
    line: _Line, start: NDArray[np.float64], defined: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """Double the distance until the loss has risen; return where it had not, where it has, and if."""
    low, high, found = np.zeros_like(start), start.copy(), np.zeros_like(defined)
    open_rows = np.flatnonzero(defined)
    for _ in range(_MOST_DOUBLINGS):
        if not len(open_rows):
            break
        above = line.rise(high[open_rows], open_rows) >= 0
        found[open_rows[above]] = True
        open_rows = open_rows[~above]
        low[open_rows] = high[open_rows]
        high[open_rows] *= 2
    return low, high, found
