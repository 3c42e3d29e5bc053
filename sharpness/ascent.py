"""The highest loss in a ball around the weights, climbed to by Auto-PGD.

In the units of the metric, u with weights w + D u and |u| <= rho (L2, or L-infinity), P the projection onto the ball:

    z = P(u_k + eta s(D grad L)),    u_{k+1} = P(u_k + 0.75 (z - u_k) + 0.25 (u_k - u_{k-1})),

s(g) = g / |g| or sign(g), eta = 2 rho at first, halved at a checkpoint where fewer than 3 of 4 steps since the last one
went up, or where neither eta nor the best loss has changed; the climb then goes on from its best point. Checkpoints
come after 22 % of the steps and then at intervals that shrink by 3 % each time, to 6 %. Source: Croce and Hein 2020,
algorithm 1; used for weights by Andriushchenko et al. 2023. Their code starts at the weights or at random, mixes
displacements where the algorithm mixes increments, and with the L2 norm steps in Euclidean directions; its step with
L-infinity is this one.

What is found is a lower bound of the maximum, and how much it still gained over the last quarter of the steps says
whether the climb had come to rest, not how far the maximum is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flatmin.sharpness.engine import GRADIENT_PASSES, LOSS_PASSES, Engine

_MOMENTUM = 0.75
_RISING_SHARE = 0.75
_LAST_PART = 0.25


@dataclass(frozen=True)
class Ball:
    """Displacements u of a norm of at most the radius.

    Attributes:
        norm: Which norm.
        radius: In units of the metric.
    """

    norm: Literal["l2", "linf"]
    radius: float

    def steepest(self, gradient: Tensor) -> Tensor:
        """Return directions of norm one along which a gradient `[K, d]` rises most; zero where there is none."""
        if self.norm == "linf":
            return gradient.sign()
        length = gradient.norm(dim=1, keepdim=True)
        return gradient / torch.where(length == 0, 1.0, length)

    def project(self, u: Tensor) -> Tensor:
        """Return the nearest displacements `[K, d]` in the ball."""
        if self.norm == "linf":
            return u.clamp(-self.radius, self.radius)
        length: Tensor = u.norm(dim=1, keepdim=True)
        return u * (self.radius / length).clamp(max=1.0)


@dataclass(frozen=True)
class Summit:
    """Where a climb has got to, each `[K]`.

    Attributes:
        loss: The highest loss met; NaN where any was not finite.
        gain: How much higher it is than three quarters through the climb.
    """

    loss: Tensor
    gain: Tensor


def passes_of_climbs(steps: int, count: int) -> float:
    """Return what `climbs` costs, the gradient at the weights included."""
    return GRADIENT_PASSES + count * (steps * GRADIENT_PASSES + LOSS_PASSES)


def climbs(engine: Engine, d: Tensor, ball: Ball, gradient: Tensor, steps: int, count: int) -> Summit:
    """Climb several times and return the highest losses met.

    The first climb starts from the edge of the ball in the direction of the gradient, or at random where that is zero;
    the others start at random.

    Args:
        engine: The models.
        d: The metric's diagonal `[K, d]`.
        ball: What may not be left.
        gradient: The loss's at the weights, times the metric's diagonal, `[K, d]`.
        steps: Steps of a climb, each of one gradient.
        count: How many climbs.
    """
    uphill = ball.radius * ball.steepest(gradient)
    made = []
    for number in range(count):
        at_random = ball.project(ball.radius * engine.vectors("normal", "climb", number, 1)[0])
        known = (gradient != 0).any(dim=1, keepdim=True) & (number == 0)
        made.append(_climb(engine, d, ball, torch.where(known, uphill, at_random), steps))
    losses, gains = (torch.stack([getattr(summit, name) for summit in made]) for name in ("loss", "gain"))
    highest = losses.amax(dim=0)
    return Summit(highest, gains.gather(0, losses.nan_to_num(-torch.inf).argmax(dim=0, keepdim=True))[0])


def _climb(engine: Engine, d: Tensor, ball: Ball, start: Tensor, steps: int) -> Summit:
    state = _Climb(engine, d, ball, start)
    checkpoints, late = _checkpoints(steps), int((1 - _LAST_PART) * steps)
    early = state.best
    for step in range(steps):
        state.look()
        if step == late:
            early = state.best
        if step in checkpoints:
            state.review(step - max([0, *(other for other in checkpoints if other < step)]))
        state.move()
    loss = engine.losses_at((d * state.u)[None])[0]
    best = torch.maximum(state.best, loss)
    return Summit(best, best - early)


class _Climb:
    """One climb of K models, all in step."""

    def __init__(self, engine: Engine, d: Tensor, ball: Ball, start: Tensor) -> None:
        self.engine, self.d, self.ball = engine, d, ball
        self.u, self.increment = start, torch.zeros_like(start)
        self.direction = torch.zeros_like(start)
        self.eta = torch.full_like(start[:, 0], 2 * ball.radius)
        self.best = torch.full_like(self.eta, -torch.inf)
        self.best_u, self.best_direction = start, self.direction
        self.last, self.rises = -self.best, torch.zeros_like(self.eta)
        self.reviewed = (self.eta.new_zeros(len(start)), self.best)

    def look(self) -> None:
        """Take the loss and the direction to go at u. A loss that is not a number stays so."""
        loss, gradient = self.engine.gradient_at(self.d * self.u)
        self.direction = self.ball.steepest(self.d * gradient)
        self.rises = self.rises + (loss > self.last)
        self.last = loss
        better = (loss > self.best)[:, None]
        self.best = torch.maximum(self.best, torch.where(loss.isfinite(), loss, torch.nan))
        self.best_u = torch.where(better, self.u, self.best_u)
        self.best_direction = torch.where(better, self.direction, self.best_direction)

    def review(self, period: int) -> None:
        """Halve the steps of climbs that have stopped to rise, and take them back to their best points."""
        eta, best = self.reviewed
        stalled = (self.rises < _RISING_SHARE * period) | ((eta == self.eta) & (best == self.best))
        self.reviewed = (self.eta, self.best)
        self.rises = torch.zeros_like(self.rises)
        self.eta = torch.where(stalled, self.eta / 2, self.eta)
        back = stalled[:, None]
        self.u = torch.where(back, self.best_u, self.u)
        self.direction = torch.where(back, self.best_direction, self.direction)
        self.increment = torch.where(back, 0.0, self.increment)
        self.last = torch.where(stalled, self.best, self.last)

    def move(self) -> None:
        """Take one step."""
        z = self.ball.project(self.u + self.eta[:, None] * self.direction)
        mixed = self.u + _MOMENTUM * (z - self.u) + (1 - _MOMENTUM) * self.increment
        moved = self.ball.project(mixed)
        self.increment, self.u = moved - self.u, moved


def _checkpoints(steps: int) -> set[int]:
    """Return before which steps a climb is reviewed."""
    before, share, found = 0.0, 0.22, set()
    while share < 1:
        found.add(math.ceil(share * steps))
        before, share = share, share + max(share - before - 0.03, 0.06)
    return found - {0}
