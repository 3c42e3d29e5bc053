"""Entropy-SGD: the gradient of the local entropy, from Langevin steps around the weights.

From x = mu = w, v = 0, on a fresh batch each time, `entropy_steps` times (r = `entropy_lr`):
v <- entropy_momentum v + grad L(x) + gamma (x - w) + entropy_weight_decay x;
x <- x - r v + sqrt(r) entropy_noise N(0, I), the noise beside the momentum, not in it;
mu <- entropy_average mu + (1 - entropy_average) x.
Returns gamma (w - mu), with gamma = min(entropy_gamma (1 + entropy_scoping)^t, entropy_gamma_max) at step t.
An epoch is one pass over the data, of which a step takes `entropy_steps` batches.
Source: Chaudhari et al. 2017, algorithm 1 and section 4.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from flatmin.optimizers.interface import Evaluation, FirstOrderRule, Gradient, State, Step, at
from flatmin.settings import Setting


def entropy(
    *,
    entropy_steps: Annotated[int, Setting(about="Langevin steps, each on a batch of its own.", unit="steps", ge=1)] = 5,
    entropy_gamma: Annotated[
        float, Setting(about="Strength of the pull to the weights at the first step.", gt=0, per_model=True)
    ] = 0.5,
    entropy_scoping: Annotated[
        float, Setting(about="Growth of that strength.", unit="fraction per step", ge=0, per_model=True)
    ] = 1e-4,
    entropy_gamma_max: Annotated[
        float, Setting(about="Largest strength of the pull to the weights.", gt=0, per_model=True)
    ] = 2.38,
    entropy_lr: Annotated[float, Setting(about="Learning rate of the Langevin steps.", gt=0, per_model=True)] = 0.1,
    entropy_noise: Annotated[
        float, Setting(about="Noise of a Langevin step, times the root of its learning rate.", ge=0, per_model=True)
    ] = 1e-4,
    entropy_momentum: Annotated[
        float, Setting(about="Momentum of the Langevin steps.", ge=0, lt=1, per_model=True)
    ] = 0.9,
    entropy_average: Annotated[
        float, Setting(about="Decay of the running mean of the Langevin iterates.", ge=0, lt=1, per_model=True)
    ] = 0.75,
    entropy_weight_decay: Annotated[
        float, Setting(about="Weight decay coefficient of the Langevin steps.", ge=0, per_model=True)
    ] = 1e-4,
) -> FirstOrderRule:
    """Gradient of the local entropy (Entropy-SGD)."""
    return _Entropy(
        entropy_steps,
        entropy_gamma,
        entropy_scoping,
        entropy_gamma_max,
        entropy_lr,
        entropy_noise,
        entropy_momentum,
        entropy_average,
        entropy_weight_decay,
    )


@dataclass(frozen=True)
class _Entropy(FirstOrderRule):
    entropy_steps: int
    entropy_gamma: float
    entropy_scoping: float
    entropy_gamma_max: float
    entropy_lr: float
    entropy_noise: float
    entropy_momentum: float
    entropy_average: float
    entropy_weight_decay: float

    @property
    def batches(self) -> int:
        return self.entropy_steps

    def gradient(self, params: Tensor, state: State, step: Step) -> Gradient:
        gamma = self._gamma(step)
        x, mu, v = params, params.clone(), torch.zeros_like(params)
        losses = None
        for batch in range(step.batches):
            here = yield at(x, batch=batch)
            losses = here.losses if losses is None else losses
            v.mul_(self.entropy_momentum).add_(here.grad)
            work = torch.sub(x, params).mul_(gamma)
            v.add_(work).add_(torch.mul(x, self.entropy_weight_decay, out=work))
            torch.mul(v, self.entropy_lr, out=work)
            x = torch.sub(x, work)
            x.add_(step.normal("entropy", batch).mul_(self.entropy_lr**0.5 * self.entropy_noise))
            mu.mul_(self.entropy_average).add_(torch.mul(x, 1 - self.entropy_average, out=work))
            del work
        assert losses is not None
        return Evaluation(losses, torch.sub(params, mu).mul_(gamma)), state

    def _gamma(self, step: Step) -> Tensor | float:
        grown = self.entropy_gamma * (1 + self.entropy_scoping) ** step.count
        if isinstance(grown, Tensor):
            return torch.minimum(grown, torch.as_tensor(self.entropy_gamma_max).to(grown))
        return min(grown, self.entropy_gamma_max)
