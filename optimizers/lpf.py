"""LPF-SGD: gradients at randomly displaced weights, the gradient of the loss through a Gaussian low-pass filter.

g = sum over micro-batches m of (share of examples) grad L_m(w + e_m), e_m ~ N(0, (gamma s)^2) independent per element,
where s is the norm that `lpf_noise` names. A step's `batch_size` examples are split into `lpf_batches` micro-batches,
so that averaging over noise costs no further pass. From step 0 to the last step T,
gamma(t) = lpf_gamma [1 + (lpf_increase - 1) (1 - cos(pi t / T)) / 2].
Source: Bisla, Wang and Choromanska 2022, algorithm 1 and section 4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from flatmin.errors import RequestError
from flatmin.optimizers.interface import Ask, Gradient, Rule, State, Step
from flatmin.optimizers.noise import scaled_like
from flatmin.settings import Setting


def lpf(
    *,
    lpf_gamma: Annotated[
        float,
        Setting(about="Standard deviation of LPF's weight noise.", unit="what lpf_noise names", ge=0, per_model=True),
    ] = 0.001,
    lpf_noise: Annotated[
        Literal["filter", "tensor", "absolute"],
        Setting(about="What LPF's noise is in proportion to: the norm of the filter, of the tensor, or nothing."),
    ] = "filter",
    lpf_batches: Annotated[
        int, Setting(about="Micro-batches that a batch is split into, each with noise of its own.", ge=1)
    ] = 1,
    lpf_increase: Annotated[
        float,
        Setting(about="Factor by which LPF's noise has grown at the end, along half a cosine.", ge=1, per_model=True),
    ] = 1.0,
) -> Rule:
    """Gradients at weights with Gaussian noise (low-pass filter)."""
    return _LPF(lpf_gamma, lpf_noise, lpf_batches, lpf_increase)


@dataclass(frozen=True)
class _LPF(Rule):
    lpf_gamma: float
    lpf_noise: Literal["filter", "tensor", "absolute"]
    lpf_batches: int
    lpf_increase: float
    splits: ClassVar[bool] = True

    @property
    def batches(self) -> int:
        return self.lpf_batches

    def gradient(self, params: Tensor, state: State, step: Step) -> Gradient:
        gamma = self.gamma(step)

        def displaced(batch: int) -> Tensor:
            noise = scaled_like(step.normal("lpf", batch), params, step.shapes, self.lpf_noise)
            return noise.mul_(gamma).add_(params)

        found = yield Ask(displaced, range(step.batches), step.hessian)
        return found, state

    def gamma(self, step: Step) -> Tensor | float:
        """Return the noise's standard deviation in a step, `[K, 1]` or a number."""
        if isinstance(self.lpf_increase, float) and self.lpf_increase == 1:
            return self.lpf_gamma
        if step.total is None:
            raise RequestError("lpf_increase needs the number of steps of the whole training: give total_steps")
        share = torch.as_tensor(step.count / step.total, dtype=step.dtype).clamp(max=1.0)
        return self.lpf_gamma * (1 + (self.lpf_increase - 1) * 0.5 * (1 - torch.cos(math.pi * share)))
