"""The norm of the local entropy's gradient: how far a Langevin chain is pulled away from the weights.

mu_LE = E[gamma |mu|], mu <- alpha mu + (1 - alpha) u over the steps of a chain that begins at u = mu = 0,

    u <- u - eta (D grad L_B(w + D u) + gamma u) + sqrt(2 eta) eps N(0, I),

in nats per unit of the metric; the expectation is over the noise and over random batches B of `batch` examples, each
of which serves a whole chain. `batch=none` takes the whole set. Source: Chaudhari et al. 2017, algorithm
1 (whose steps each take a batch of their own, and whose noise is sqrt(eta) eps); as a measure Bisla et al. 2022, mu_LE,
with 20 steps, eta = 0.1, eps = 1e-4, gamma = 1e-4, alpha = 0.75 and every batch of the training set once.

Their code leaves gamma out, `times_gamma=false`; for one gamma the two differ by a constant. On small batches the
value is mostly the noise of the batches' gradients. With gamma and eps so small it is gradient descent for 20
steps, and says little of the neighbourhood beyond the gradient's norm.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from flatmin.settings import Setting
from flatmin.sharpness.arguments import ExamplesPerBatch, Gamma, MaxSamples, MetricChoice, Steps, Tolerance
from flatmin.sharpness.batchwise import batch_mean
from flatmin.sharpness.engine import GRADIENT_PASSES, Engine
from flatmin.sharpness.estimate import Estimate

REFUSES = {
    "subset": "it is taken on random batches already (`batch`), and stops when they have told enough",
}


def local_entropy_gradient(
    engine: Engine,
    *,
    gamma: Gamma = 1e-4,
    metric: MetricChoice = "filter",
    batch: ExamplesPerBatch = 256,
    times_gamma: Annotated[
        bool, Setting(about="Whether the distance is multiplied by gamma; the published code leaves it out.")
    ] = True,
    steps: Steps = 20,
    langevin_lr: Annotated[float, Setting(about="Learning rate of a Langevin step.", gt=0)] = 0.1,
    langevin_noise: Annotated[
        float, Setting(about="Noise of a Langevin step, times the root of twice its learning rate.", ge=0)
    ] = 1e-4,
    langevin_average: Annotated[
        float, Setting(about="Decay of the running mean of a chain's points.", ge=0, lt=1)
    ] = 0.75,
    tolerance: Tolerance = 0.02,
    max_samples: MaxSamples = 64,
) -> Estimate:
    """Norm of the gradient of the local entropy, from Langevin chains around the weights.

    A chain that leaves the finite numbers makes the value undefined. `samples` are chains.

    Args:
        engine: The models.
        gamma: Strength of the pull to w.
        metric: What scales the chain's displacements.
        batch: Examples of a chain; the whole set where it has no more.
        times_gamma: Whether the distance is multiplied by gamma.
        steps: Steps of a chain.
        langevin_lr: eta.
        langevin_noise: eps.
        langevin_average: alpha.
        tolerance: Standard error at which a model's sampling stops, as a fraction of its value.
        max_samples: The most chains per model.
    """

    def chain(on: Engine) -> tuple[Tensor, Tensor]:
        d = on.scale(metric)
        u = mean = torch.zeros_like(d)
        # A displacement of a dead filter (D = 0) moves no weight: the noise leaves it out.
        spread = (2 * langevin_lr) ** 0.5 * langevin_noise * (d != 0)
        for step in range(steps):
            if not bool(u.isfinite().all(dim=1).any()):
                break
            _, gradient = on.gradient_at(d * u)
            noise = spread * on.vectors("normal", "langevin", step, 1)[0]
            u = u - langevin_lr * (d * gradient + gamma * u) + noise
            mean = langevin_average * mean + (1 - langevin_average) * u
        distance = mean.norm(dim=1)
        return (gamma if times_gamma else 1.0) * distance, torch.zeros_like(distance)

    return batch_mean(
        engine, batch, chain, passes=steps * GRADIENT_PASSES, tolerance=tolerance, max_samples=max_samples
    )
