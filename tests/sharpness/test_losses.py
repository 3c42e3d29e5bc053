from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from flatmin.errors import RequestError
from flatmin.sharpness.losses import NAMED, check_mean, cross_entropy, per_example, squared_error

OUTPUTS = torch.randn(7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
CLASSES = torch.tensor([0, 1, 2, 2, 1, 0, 1])
NUMBERS = OUTPUTS.flip(0)


def own_mean(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).abs().mean()


@pytest.mark.parametrize(
    ("loss", "targets"),
    [
        (nn.CrossEntropyLoss(), CLASSES),
        (nn.CrossEntropyLoss(reduction="none", label_smoothing=0.1), CLASSES),
        (nn.MSELoss(), NUMBERS),
        (nn.MSELoss(reduction="none"), NUMBERS),
        (functional.cross_entropy, CLASSES),
        (partial(functional.smooth_l1_loss, beta=0.3), NUMBERS),
        (own_mean, NUMBERS),
        (lambda outputs, targets: (outputs - targets).square().sum(dim=1), NUMBERS),
        ("cross_entropy", CLASSES),
        ("squared_error", CLASSES),
    ],
)
def test_every_loss_becomes_one_number_per_example(loss: Any, targets: Tensor) -> None:
    single = per_example(loss)
    losses = single(OUTPUTS, targets)
    assert losses.shape == (7,)
    for k in range(7):
        assert losses[k].item() == pytest.approx(single(OUTPUTS[k : k + 1], targets[k : k + 1]).item(), rel=1e-12)
    whole = NAMED[loss] if isinstance(loss, str) else loss
    assert losses.mean().item() == pytest.approx(whole(OUTPUTS, targets).mean().item(), rel=1e-12)
    check_mean(whole, single, OUTPUTS, targets)


def test_a_mean_of_ones_own_has_second_derivatives() -> None:
    at = OUTPUTS.clone().requires_grad_()
    single = per_example(lambda outputs, targets: (outputs - targets).pow(4).mean())
    (grad,) = torch.autograd.grad(single(at, NUMBERS).sum(), at, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), at)
    assert torch.allclose(second, 4 * (OUTPUTS - NUMBERS).square())


@pytest.mark.parametrize("classes", [2, 32, 33])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("stacked", [False, True])
def test_cross_entropy_and_its_derivatives_are_torchs(classes: int, smoothing: float, stacked: bool) -> None:
    z, y = 3 * torch.randn(2, 5, classes, dtype=torch.float64), torch.randint(classes, (2, 5))
    torchs = partial(functional.cross_entropy, reduction="none", label_smoothing=smoothing)

    def found(loss: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        own = torch.func.vmap(loss) if stacked else lambda z, y: torch.stack([loss(z[0], y[0]), loss(z[1], y[1])])
        leaf = z.clone().requires_grad_()
        losses = own(leaf, y)
        (grad,) = torch.autograd.grad(losses.square().sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(grad.square().sum(), leaf)
        return losses, grad, second

    for ours, theirs in zip(found(partial(cross_entropy, label_smoothing=smoothing)), found(torchs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("classes", [3, 40])
def test_classes_may_be_bytes(classes: int) -> None:
    z, y = torch.randn(7, classes), torch.randint(3, (7,))
    torch.testing.assert_close(cross_entropy(z, y.byte()), cross_entropy(z, y))


def test_the_given_module_is_not_changed() -> None:
    loss = nn.MSELoss()
    per_example(loss)(OUTPUTS, NUMBERS)
    assert (loss.reduction, loss.training) == ("mean", True)


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)),
        nn.CrossEntropyLoss(ignore_index=1),
        lambda outputs, targets: (outputs.mean(dim=0) - targets.double().mean()).square().mean(),
        lambda outputs, targets: functional.cross_entropy(outputs, targets).sqrt(),
    ],
    ids=["weights", "ignored", "batch", "root"],
)
def test_a_loss_that_is_no_mean_over_examples_is_refused(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(RequestError, match="a mean over examples"):
        check_mean(loss, per_example(loss), OUTPUTS, CLASSES)


def test_other_requests_are_refused() -> None:
    with pytest.raises(RequestError, match="reduction 'sum'"):
        per_example(nn.MSELoss(reduction="sum"))
    with pytest.raises(RequestError, match="no loss 'hinge'; valid: cross_entropy, squared_error"):
        per_example("hinge")
    with pytest.raises(RequestError, match="differ in shape"):
        squared_error(OUTPUTS, NUMBERS[:, :2])


def test_dense_outputs_are_averaged_within_an_example() -> None:
    outputs, targets = torch.randn(4, 3, 5, 6), torch.randint(3, (4, 5, 6))
    losses = cross_entropy(outputs, targets)
    assert losses.shape == (4,)
    assert losses[1].item() == pytest.approx(functional.cross_entropy(outputs[1:2], targets[1:2]).item(), rel=1e-6)
