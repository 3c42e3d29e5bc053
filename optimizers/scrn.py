"""SCRN: Newton's step with a cubic regulariser, from stochastic gradients and Hessian-vector products.

The step D minimises the model  g.D + D.H D / 2 + (rho / 6) |D|^3  (rho = `scrn_penalty`, l = `scrn_smoothness`):
where |g| >= l^2 / rho, along the gradient (Cauchy point):  c = g.H g / (rho |g|^2),
D = -(sqrt(c^2 + 2 |g| / rho) - c) g / |g|;
elsewhere by gradient descent on the model, from D = 0:  D <- D - eta (g + sigma xi + H D + (rho / 2) |D| D) with
eta = 1 / (20 l), sigma = scrn_noise sqrt(scrn_tolerance rho) / l and xi uniform on the unit sphere.
Then w <- w + D: no learning rate, momentum or weight decay, and no schedule acts on it.
Source: Tripuraneni et al. 2018, algorithms 1 and 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from flatmin.optimizers.interface import Evaluation, HessianProduct, SecondOrderBase, State, Step
from flatmin.settings import Setting


def scrn(
    *,
    scrn_penalty: Annotated[
        float, Setting(about="Weight rho of the cubic term: the Hessian's Lipschitz constant.", gt=0, per_model=True)
    ] = 0.1,
    scrn_smoothness: Annotated[
        float, Setting(about="The gradient's Lipschitz constant l; the inner step is 1 / (20 l).", gt=0, per_model=True)
    ] = 0.5,
    scrn_steps: Annotated[int, Setting(about="Inner steps on the cubic model.", unit="steps", ge=1)] = 10,
    scrn_noise: Annotated[
        float, Setting(about="Size c' of the noise that leaves saddle points.", ge=0, per_model=True)
    ] = 0.1,
    scrn_tolerance: Annotated[
        float, Setting(about="Gradient norm that is aimed at; it sets the noise.", gt=0, per_model=True)
    ] = 1e-3,
    scrn_stop: Annotated[
        float, Setting(about="Norm of H D above which the inner steps of a model stop.", gt=0, per_model=True)
    ] = 200.0,
) -> SecondOrderBase:
    """Stochastic cubic-regularised Newton steps."""
    return _SCRN(scrn_penalty, scrn_smoothness, scrn_steps, scrn_noise, scrn_tolerance, scrn_stop)


@dataclass(frozen=True)
class _SCRN:
    scrn_penalty: float
    scrn_smoothness: float
    scrn_steps: int
    scrn_noise: float
    scrn_tolerance: float
    scrn_stop: float

    @property
    def products(self) -> float:
        return max(1, self.scrn_steps - 1)

    def needs_hessian(self, count: int) -> bool:
        return True

    def init(self, params: Tensor) -> State:
        return {}

    def update(self, params: Tensor, found: Evaluation, state: State, step: Step) -> tuple[Tensor, State]:
        assert found.hvp is not None
        g = found.grad
        norm = g.norm(dim=1, keepdim=True)
        steep = norm >= self.scrn_smoothness**2 / self.scrn_penalty
        new = params
        if bool(steep.any()):
            new = torch.addcmul(params, g, self._cauchy_length(g, norm, found.hvp))
        if not bool(steep.all()):
            new = torch.where(steep, new, params + self._descent(g, found.hvp, step))
        return new, {}

    def _cauchy_length(self, g: Tensor, norm: Tensor, hvp: HessianProduct) -> Tensor:
        """Return what of the gradient the step is, `[K, 1]`."""
        rho = self.scrn_penalty
        c = (g * hvp(g)).sum(dim=1, keepdim=True) / (rho * norm**2)
        root = (c**2 + 2 * norm / rho).sqrt()
        # the same number twice; the difference of two large ones would lose all digits
        length = torch.where(c > 0, 2 * norm / rho / (root + c), root - c)
        return -length / norm

    def _descent(self, g: Tensor, hvp: HessianProduct, step: Step) -> Tensor:
        rho = self.scrn_penalty
        eta = 1 / (20 * self.scrn_smoothness)
        xi = step.normal("scrn")
        length: Tensor = xi.norm(dim=1, keepdim=True)
        sigma = self.scrn_noise * (self.scrn_tolerance * rho) ** 0.5 / self.scrn_smoothness
        noisy = g + sigma * xi / length
        change = -eta * noisy
        going = torch.ones_like(change[:, :1], dtype=torch.bool)
        for _ in range(self.scrn_steps - 1):
            product = hvp(change)
            curved: Tensor = product.norm(dim=1, keepdim=True)
            going = going & ~(curved > self.scrn_stop)
            slope = noisy + product + rho / 2 * change.norm(dim=1, keepdim=True) * change
            change = torch.where(going, change - eta * slope, change)
        assert isinstance(change, Tensor)
        return change
