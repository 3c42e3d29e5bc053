"""The published procedure for the measures of a trained network, in plain PyTorch with its own structure.

Source of formulas and settings: Bisla, Wang and Choromanska 2022 (LPF-SGD), section 3 and supplement.
The network is balanced first: each filter is divided by its norm, and what comes out is multiplied by it. Then every
measure goes through a shuffling DataLoader of batches of 256, in eval mode, as often as its own loop asks: nothing is
shared, and a product with the Hessian builds its graph anew for every vector. Two things are kinder than the
original: no worker processes (they were started again for every pass), and examples that are tensors already.

Every measure is a number of equal units (a pass, a bisection, a product), of which a part may be run and the time
scaled.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

BATCH = 256
LPF_DRAWS, LPF_SIGMA = 100, 0.01
PAC_DRAWS, PAC_BISECTIONS = 10, 27
ENTROPY_DRAWS, GAMMA = 100, 100.0
FROBENIUS_DRAWS, LANGEVIN_STEPS = 10, 20
LANCZOS_STEPS, LANCZOS_RUNS = 100, 2
EPSILON, CLOSE = 0.1, 1e-6


class _Scaled(nn.Module):
    """A layer whose outputs are multiplied by constants, one per channel."""

    def __init__(self, layer: nn.Module, factor: Tensor) -> None:
        super().__init__()
        self.layer, self.factor = layer, factor

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out * (self.factor[:, None, None] if out.dim() == 4 else self.factor)


def balanced(model: nn.Module) -> nn.Module:
    """Return the same function with filters of norm one, in eval mode."""
    model = copy.deepcopy(model).eval()
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
                setattr(parent, name, _balanced_layer(layer))
    return model


@torch.no_grad()
def _balanced_layer(layer: nn.Conv2d | nn.Linear | nn.BatchNorm2d) -> nn.Module:
    weight, bias = layer.weight, layer.bias
    factor = weight.detach().flatten(1).norm(dim=1) if weight.dim() > 1 else weight.detach().abs()
    if bias is not None:
        factor = factor + bias.abs()
        bias.div_(factor)
    weight.div_(factor.reshape(-1, *[1] * (weight.dim() - 1)))
    return _Scaled(layer, factor)


@dataclass(frozen=True)
class Part:
    """A measure's loop.

    Attributes:
        units: How many equal units the published settings make.
        run: Runs so many of them and returns the value, or what there is of it.
        always: Whether all are run even when a part is asked for.
        passes: Passes over the examples that all units take, a gradient counted as 2 and a product as 4.
    """

    units: int
    run: Callable[[int], float]
    passes: float
    always: bool = False


class Published:
    """The published measures of one network.

    Args:
        model: The network as trained.
        x: Training examples.
        y: Their classes.
        seed: Of what is random.
    """

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, seed: int = 0) -> None:
        self.model = balanced(model)
        self.weights = [parameter.requires_grad_() for parameter in self.model.parameters()]
        self.centre = [weight.detach().clone() for weight in self.weights]
        self.device = x.device
        torch.manual_seed(seed)
        self.loader = DataLoader(TensorDataset(x, y), BATCH, shuffle=True)
        self.parts = {
            "shannon_entropy": Part(1, self.shannon_entropy, 1),
            "eps_sharpness": Part(1, self.eps_sharpness, 27, always=True),
            "pac_bayes": Part(PAC_BISECTIONS, self.pac_bayes, PAC_BISECTIONS * PAC_DRAWS),
            "hessian_frobenius": Part(FROBENIUS_DRAWS, self.hessian_frobenius, 4 * FROBENIUS_DRAWS),
            "fisher_rao": Part(1, self.fisher_rao, 4),
            "lpf": Part(LPF_DRAWS, self.lpf, LPF_DRAWS),
            "local_entropy": Part(ENTROPY_DRAWS, self.local_entropy, ENTROPY_DRAWS),
            "local_entropy_gradient": Part(LANGEVIN_STEPS, self.local_entropy_gradient, 2 * LANGEVIN_STEPS),
            "Lanczos": Part(LANCZOS_RUNS * LANCZOS_STEPS, self.lanczos, 4 * LANCZOS_RUNS * LANCZOS_STEPS),
        }
        """`Lanczos` serves hessian_trace, lambda_max and effective_dimension; its value is the largest Ritz value."""

    def shannon_entropy(self, _units: int) -> float:
        """Return the mean entropy of the predicted classes."""
        total = 0.0
        with torch.no_grad():
            for x, _ in self.loader:
                p = self.model(x).softmax(dim=1)
                total -= float((p * p.log()).nan_to_num().sum())
        return total / self._examples

    def eps_sharpness(self, _units: int) -> float:
        """Return the inverse of the distance along the gradient to a rise of epsilon: bracket by 5, then bisect."""
        base, gradient = self.loss(), self._gradient()
        norm = math.sqrt(sum(float(part.square().sum()) for part in gradient))
        low, high = 1e-16, 1.0
        while not self._rises(gradient, high, base):
            low, high = high, 5 * high
        while high - low > CLOSE:
            middle = (low + high) / 2
            rise = self._at([middle * part for part in gradient]) - base
            if abs(rise - EPSILON) < CLOSE:
                break
            low, high = (low, middle) if not rise <= EPSILON else (middle, high)
        return 1 / ((low + high) / 2 * norm)

    def pac_bayes(self, units: int) -> float:
        """Return |w|^2 / (4 sigma^2), sigma by bisection of [5e-324, 100] with fresh draws at every trial."""
        base, low, high = self.loss(), 5e-324, 100.0
        sigma = 0.001
        for _ in range(units):
            rise = sum(self._at(self._noise(sigma)) for _ in range(PAC_DRAWS)) / PAC_DRAWS - base
            low, high = (sigma, high) if rise <= EPSILON else (low, sigma)
            sigma = (low + high) / 2
        square = sum(float(part.square().sum()) for part in self.centre)
        return square / (4 * sigma**2) + math.log(2 * self._examples / 1e-6)

    def hessian_frobenius(self, units: int) -> float:
        """Return the root of the mean |H v|^2 over normal v."""
        squares = [sum(float(part.square().sum()) for part in self._product(self._noise(1.0))) for _ in range(units)]
        return math.sqrt(sum(squares) / units)

    def fisher_rao(self, _units: int) -> float:
        """Return w^T H w."""
        product = self._product(self.centre)
        return sum(float((a * b).sum()) for a, b in zip(self.centre, product, strict=True))

    def lpf(self, units: int) -> float:
        """Return the mean loss under noise of deviation sigma."""
        return sum(self._at(self._noise(LPF_SIGMA)) for _ in range(units)) / units

    def local_entropy(self, units: int) -> float:
        """Return minus the log of the mean of exp(+L) under noise of deviation 1 / gamma, unnormalised."""
        losses = torch.tensor([self._at(self._noise(1 / GAMMA)) for _ in range(units)])
        return math.log(units) - float(torch.logsumexp(losses, dim=0))

    def local_entropy_gradient(self, units: int) -> float:
        """Return the mean over batches of how far a Langevin chain of so many steps is pulled away."""
        rate, noise, decay, pull = 0.1, 1e-4, 0.75, 1e-4
        distances = []
        for x, y in self.loader:
            mean = [weight.clone() for weight in self.centre]
            for _ in range(units):
                gradient = torch.autograd.grad(functional.cross_entropy(self.model(x), y), self.weights)
                with torch.no_grad():
                    for weight, slope, start, running in zip(self.weights, gradient, self.centre, mean, strict=True):
                        kick = torch.randn_like(weight) * (noise / math.sqrt(0.5 * rate))
                        weight -= rate * (slope - pull * (start - weight) + kick)
                        running.mul_(decay).add_(weight, alpha=1 - decay)
            distances.append(
                math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(self.centre, mean, strict=True)))
            )
            self._restore()
        return sum(distances) / len(distances)

    def lanczos(self, units: int) -> float:
        """Return the largest Ritz value of so many steps, 100 to a run, fully reorthogonalised in float64."""
        return max(
            max(self._lanczos_run(min(LANCZOS_STEPS, units - first))) for first in range(0, units, LANCZOS_STEPS)
        )

    def loss(self) -> float:
        """Return the mean loss of the weights as they are now."""
        total = 0.0
        with torch.no_grad():
            for x, y in self.loader:
                total += float(functional.cross_entropy(self.model(x), y)) * len(y)
        return total / self._examples

    @property
    def _examples(self) -> int:
        return len(self.loader.dataset)  # type: ignore[arg-type]

    def _lanczos_run(self, steps: int) -> list[float]:
        count = sum(weight.numel() for weight in self.weights)
        q = torch.zeros(steps, count, dtype=torch.float64)
        alpha, beta = torch.zeros(steps, dtype=torch.float64), torch.zeros(steps, dtype=torch.float64)
        start = torch.rand(count, dtype=torch.float64) * 2 - 1
        q[0] = start / start.norm()
        for j in range(steps):
            z = torch.cat([part.flatten() for part in self._product(self._pieces(q[j]))]).double().cpu()
            alpha[j] = q[j] @ z
            z -= q[: j + 1].T @ (q[: j + 1] @ z)
            beta[j] = z.norm()
            if j + 1 < steps:
                q[j + 1] = z / beta[j]
        t = torch.diag(alpha) + torch.diag(beta[:-1], 1) + torch.diag(beta[:-1], -1)
        found: list[float] = torch.linalg.eigvalsh(t).tolist()
        return found

    def _pieces(self, flat: Tensor) -> list[Tensor]:
        parts = torch.split(flat.to(self.device, torch.float32), [weight.numel() for weight in self.weights])
        return [part.reshape(weight.shape) for part, weight in zip(parts, self.weights, strict=True)]

    def _product(self, vector: list[Tensor]) -> list[Tensor]:
        total = [torch.zeros_like(weight) for weight in self.weights]
        for x, y in self.loader:
            loss = functional.cross_entropy(self.model(x), y)
            gradient = torch.autograd.grad(loss, self.weights, create_graph=True)
            for part, new in zip(total, torch.autograd.grad(gradient, self.weights, vector), strict=True):
                part += new
        return [part / len(self.loader) for part in total]

    def _gradient(self) -> list[Tensor]:
        total = [torch.zeros_like(weight) for weight in self.weights]
        for x, y in self.loader:
            loss = functional.cross_entropy(self.model(x), y) * len(y) / self._examples
            for part, new in zip(total, torch.autograd.grad(loss, self.weights), strict=True):
                part += new
        return total

    def _noise(self, sigma: float) -> list[Tensor]:
        return [torch.randn_like(weight) * sigma for weight in self.centre]

    def _rises(self, gradient: list[Tensor], distance: float, base: float) -> bool:
        return not self._at([distance * part for part in gradient]) - base < EPSILON

    @torch.no_grad()
    def _at(self, displacement: list[Tensor]) -> float:
        for weight, move in zip(self.weights, displacement, strict=True):
            weight += move
        loss = self.loss()
        self._restore()
        return loss

    @torch.no_grad()
    def _restore(self) -> None:
        for weight, start in zip(self.weights, self.centre, strict=True):
            weight.copy_(start)

    def runs(self, fraction: float) -> Iterator[tuple[str, Part, int]]:
        """Yield every measure's name, loop, and how many units make a fraction of it, one at least."""
        for name, part in self.parts.items():
            yield name, part, part.units if part.always else max(1, round(fraction * part.units))
