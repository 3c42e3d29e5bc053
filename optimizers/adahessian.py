"""AdaHessian: Adam with a running mean of squares of the Hessian's diagonal in its denominator.

D = mean over samples of z * (H z), z = +-1 at random (Hutchinson's diagonal), then averaged as `hessian_average` says;
m <- beta1 m + (1 - beta1) g;  s <- beta2 s + (1 - beta2) D^2;
w <- w - lr [ (m / (1 - beta1^t)) / ((s / (1 - beta2^t))^(hessian_power / 2) + adahessian_eps) + weight_decay w ].
H is the Hessian of the function whose gradient the rule returned. Between two steps that compute D (`hessian_every`)
the last one is used again. Source: Yao et al. 2021, equations 8 to 12 and algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal

import torch
from torch import Tensor

from flatmin.optimizers.adam import no_steps
from flatmin.optimizers.arguments import Beta1, Beta2, LearningRate, WeightDecay
from flatmin.optimizers.interface import Evaluation, HessianProduct, SecondOrderBase, State, Step
from flatmin.optimizers.terms import matters, root, scalar
from flatmin.settings import Setting


def adahessian(
    *,
    lr: LearningRate = 0.15,
    beta1: Beta1 = 0.9,
    beta2: Beta2 = 0.999,
    adahessian_eps: Annotated[float, Setting(about="Added to AdaHessian's denominator.", gt=0, per_model=True)] = 1e-4,
    weight_decay: WeightDecay = 0.0,
    hessian_power: Annotated[
        float, Setting(about="Power of the Hessian's diagonal in the denominator.", ge=0, le=1, per_model=True)
    ] = 1.0,
    hessian_samples: Annotated[int, Setting(about="Random vectors per estimate of the Hessian's diagonal.", ge=1)] = 1,
    hessian_every: Annotated[
        int, Setting(about="Steps from one estimate of the Hessian's diagonal to the next.", unit="steps", ge=1)
    ] = 1,
    hessian_average: Annotated[
        Literal["none", "spatial", "row"],
        Setting(about="Over what |diagonal| is averaged: nothing; each convolution kernel; that and each linear row."),
    ] = "spatial",
) -> SecondOrderBase:
    """Adam with the Hessian's diagonal in its denominator, weight decay decoupled."""
    return _AdaHessian(
        lr,
        beta1,
        beta2,
        adahessian_eps,
        weight_decay,
        hessian_power,
        hessian_samples,
        hessian_every,
        hessian_average,
    )


@dataclass(frozen=True)
class _AdaHessian:
    lr: float
    beta1: float
    beta2: float
    adahessian_eps: float
    weight_decay: float
    hessian_power: float
    hessian_samples: int
    hessian_every: int
    hessian_average: str

    @property
    def products(self) -> float:
        return self.hessian_samples / self.hessian_every

    def needs_hessian(self, count: int) -> bool:
        return count % self.hessian_every == 0

    def init(self, params: Tensor) -> State:
        state = {"mean": torch.zeros_like(params), "square": torch.zeros_like(params), "steps": no_steps(params)}
        return state if self.hessian_every == 1 else {**state, "diagonal": torch.zeros_like(params)}

    def update(self, params: Tensor, found: Evaluation, state: State, step: Step) -> tuple[Tensor, State]:
        diagonal = self._diagonal(found.hvp, step) if found.hvp is not None else state["diagonal"]
        t = state["steps"] + 1
        m = torch.lerp(state["mean"], found.grad, scalar(1 - self.beta1, params))
        s = torch.lerp(state["square"], diagonal.square(), scalar(1 - self.beta2, params))
        s_hat = s / (1 - self.beta2**t).to(s.dtype)
        denominator = root(s_hat)
        if self._has_power:
            powers = s_hat.pow_(self.hessian_power / 2)
            denominator = torch.where(torch.as_tensor(self.hessian_power == 1), denominator, powers)
        denominator.add_(self.adahessian_eps)
        lr = self.lr * step.lr_factor
        scaled = m * (lr / (1 - self.beta1**t)).to(m.dtype)
        kept = {} if self.hessian_every == 1 else {"diagonal": diagonal}
        new = torch.addcdiv(params, scaled, denominator, value=-1)
        if self._decays:
            new.sub_(lr * self.weight_decay * params)
        return new, {"mean": m, "square": s, "steps": t, **kept}

    @cached_property
    def _decays(self) -> bool:
        return matters(self.weight_decay)

    @cached_property
    def _has_power(self) -> bool:
        """Whether some root is not the square root, which is faster than any other."""
        return matters(self.hessian_power - 1)

    def _diagonal(self, hvp: HessianProduct, step: Step) -> Tensor:
        total: Tensor | float = 0.0
        for sample in range(self.hessian_samples):
            z = step.rademacher("adahessian", sample)
            total = z.mul_(hvp(z)).add_(total)
        assert isinstance(total, Tensor)
        return _averaged(total.div_(self.hessian_samples), step, self.hessian_average)


def _averaged(diagonal: Tensor, step: Step, over: str) -> Tensor:
    """Return |diagonal| `[K, d]` averaged over the kernel of each convolution, and over each row of a matrix if asked.

    Biases, BatchNorm and, unless `over` is `row`, matrices are as they were.
    """
    if over == "none":
        return diagonal
    parts = []
    for part, shape in zip(
        torch.split(diagonal, [torch.Size(s).numel() for s in step.shapes], dim=1), step.shapes, strict=True
    ):
        if part.shape[1] and (len(shape) > 2 or (len(shape) == 2 and over == "row")):
            kept = 2 if len(shape) > 2 else 1
            averaged = part.abs().reshape(len(part), torch.Size(shape[:kept]).numel(), -1).mean(dim=2, keepdim=True)
            size = torch.Size(shape[kept:]).numel()
            parts.append(averaged.expand(-1, -1, size).flatten(1))
        else:
            parts.append(part)
    return torch.cat(parts, dim=1)
