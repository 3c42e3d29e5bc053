"""The Fisher-Rao norm, w^T F w, in squared nats (true and empirical Fisher) or nats (Hessian).

Source: Liang, Poggio, Rakhlin and Stokes 2019: |w|^2 in the Fisher information metric; no root is taken.

    true       F = E_x E_{y ~ p(.|x, w)}[g g^T], g the gradient of log p: no label is looked at
    empirical  F = mean over examples of g g^T with the labels as they are
    hessian    w^T H w, which Bisla et al. 2022 compute under this name

With t = J w, the outputs' derivative along the weights, w^T g is a function of t alone, so no example's gradient is
taken, and w^T F w = mean t^T S t for the Fisher information S of the outputs. For a loss of the form a(o) - o . s(y)
(cross-entropy with labels, smoothed or not; squared error, as of a Gaussian with p proportional to exp(-loss)) the
expectation over the model's own predictions is the loss's curvature in the outputs, S = a''(o): for a softmax
sum_c p_c t_c^2 - (sum_c p_c t_c)^2, exactly.

The metric cancels: on the balanced network w becomes w / D and F becomes D F D, and a weight with D = 0 is 0. So
there is none to choose, and the published value on the balanced network is this one. All three are unchanged when
layers are rescaled without changing the function.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor

from flatmin.errors import RequestError
from flatmin.settings import Setting
from flatmin.sharpness.engine import PRODUCT_PASSES, TANGENT_PASSES, Engine
from flatmin.sharpness.estimate import Estimate, exact_by_part
from flatmin.sharpness.products import product

_AGREE = 1e-4


def fisher_rao(
    engine: Engine,
    *,
    fisher: Annotated[
        Literal["true", "empirical", "hessian"], Setting(about="The matrix: a Fisher information, or the Hessian.")
    ] = "true",
) -> Estimate:
    """Squared length of the weights in the Fisher information metric of the training set.

    Exact: three passes over the examples, or four with the Hessian. `hessian` may be negative.

    Args:
        engine: The models.
        fisher: Which matrix.

    Raises:
        RequestError: `true` with a loss whose curvature in the outputs depends on the labels, so that no distribution
            of the labels belongs to it.
    """
    w = engine.params.double()[None]
    if fisher == "hessian":
        return exact_by_part(product(engine, torch.ones_like(w[0]), w).along[0], passes=PRODUCT_PASSES)
    if fisher == "empirical":
        return exact_by_part(engine.means(engine.slopes(w)[0].square()), passes=TANGENT_PASSES)

    of_the_set = _two_targets(engine)

    def curvature(outputs: Tensor, tangents: Tensor, targets: Tensor) -> Tensor:
        along = _curvature(engine, outputs, tangents, targets)
        _check(along, _curvature(engine, outputs, tangents, _others(outputs, targets, of_the_set)))
        return along

    return exact_by_part(engine.means(engine.per_example_along(w, curvature)[0]), passes=TANGENT_PASSES)


def _curvature(engine: Engine, outputs: Tensor, tangents: Tensor, targets: Tensor) -> Tensor:
    """Return t^T (d^2 loss / d outputs^2) t of every example, `[n]`."""
    with torch.enable_grad():
        at = outputs.detach().requires_grad_()
        (grad,) = torch.autograd.grad(engine.loss(at, targets).sum(), at, create_graph=True)
        if not grad.requires_grad:
            return torch.zeros_like(tangents.flatten(1)[:, 0])
        (product,) = torch.autograd.grad((grad * tangents).sum(), at)
    return (product * tangents).flatten(1).sum(dim=1)


def _two_targets(engine: Engine) -> Tensor:
    """Return the first target of the examples and the first that differs from it, `[2, ...]`, or `[1, ...]`."""
    targets = torch.cat([batch.y.flatten(0, 1) for batch in engine.batches])
    others = targets[(targets != targets[0]).reshape(len(targets), -1).any(dim=1)]
    return torch.cat([targets[:1], others[:1]])


def _others(outputs: Tensor, targets: Tensor, of_the_set: Tensor) -> Tensor:
    """Return another target for every example, whatever its batch: the next class, or another of the set's.

    Where all targets of a set are one and no class, a half is moved from each one's second number to its first, which
    keeps the sum of probabilities.

    Args:
        outputs: `[n, ...]`.
        targets: `[n, ...]`.
        of_the_set: Two targets that differ, or the only one.
    """
    if not targets.is_floating_point() and targets.dim() == outputs.dim() - 1:
        return torch.where(targets < 0, targets, (targets + 1) % outputs.shape[1])
    if len(of_the_set) == 2:
        first, second = of_the_set
        same = (targets == first).reshape(len(targets), -1).all(dim=1)
        return torch.where(same.reshape(-1, *[1] * (targets.dim() - 1)), second, first)
    moved = targets.double().reshape(len(targets), -1)
    moved[:, :2] += torch.tensor([0.5, -0.5], dtype=moved.dtype, device=moved.device)[: moved.shape[1]]
    return moved.reshape(targets.shape).to(targets.dtype)


def _check(own: Tensor, of_other_labels: Tensor) -> None:
    both = own.isfinite() & of_other_labels.isfinite()
    size = own[both].abs().max() if bool(both.any()) else 0.0
    if bool(((own - of_other_labels)[both].abs() > _AGREE * size).any()):
        raise RequestError(
            "the curvature of this loss in the outputs depends on the labels, so its predictions are no distribution "
            "of which fisher=true could be the information; take fisher=empirical or fisher=hessian"
        )
