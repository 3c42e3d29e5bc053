"""Small classifiers, somebody's training loop over a `TorchOptimizer`, and torch's and hand-written ones beside it."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from flatmin.optimizers import TorchOptimizer
from flatmin.optimizers.compose import Composed
from flatmin.plugins import Plugin, listing, optimizer_names, optimizer_parts

Closure = Callable[[], Tensor]

NAMES = optimizer_names()
BASES = [name for name in NAMES if "-" not in name]
CLIMBING = ("sam", "asam", "vasso")

CHANGED: Mapping[str, Mapping[str, Any]] = {
    "sam": {"rho": 0.3},
    "vasso": {"rho": 0.3, "theta": 0.4},
    "lpf": {"lpf_gamma": 0.1, "lpf_batches": 3, "lpf_increase": 4.0},
    "smoothout": {"smoothout_radius": 0.2},
    "entropy": {"entropy_steps": 3, "entropy_noise": 0.05},
    "sgd": {"lr": 0.05, "weight_decay": 0.02},
    "adam": {"lr": 0.02, "weight_decay": 0.02},
    "adamw": {"lr": 0.02, "weight_decay": 0.02},
    "adahessian": {"lr": 0.02, "weight_decay": 0.02, "hessian_every": 2},
    "scrn": {"scrn_penalty": 5.0, "scrn_noise": 2.0},
}
"""Settings at which every part of a name shows in a few steps."""


@functools.cache
def second_order(name: str) -> bool:
    return listing("optimizer")[name.rpartition("-")[2]].returns == "SecondOrderBase"


def settings_of(name: str, **changes: Any) -> dict[str, Any]:
    own = {key: value for part in name.split("-") for key, value in CHANGED.get(part, {}).items()}
    if second_order(name):
        own.pop("lpf_batches", None)
    return {**own, **changes}


@functools.cache
def parts_of(name: str) -> list[Plugin]:
    return optimizer_parts(name)


def batches_of(name: str, settings: Mapping[str, Any]) -> int:
    parts = parts_of(name)
    defaults = {key: argument.default for part in parts for key, argument in part.arguments.items()}
    return Composed(parts, {**defaults, **settings}).rule.batches


def network(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    """A small classifier with a convolution, and BatchNorm of both kinds of running mean."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv1d(1, 2, 3, padding=1),
            nn.BatchNorm1d(2),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(12, 5),
            nn.BatchNorm1d(5, momentum=None),
            nn.Tanh(),
            nn.Linear(5, 3),
        ).to(dtype)


def mlp(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def batch(number: int, like: nn.Module, part: int = 0) -> tuple[Tensor, Tensor]:
    """Return the examples and classes of a numbered batch, in the type of a module's weights."""
    generator = torch.Generator().manual_seed(1000 * part + number)
    x = torch.randn(8, 1, 6, generator=generator, dtype=torch.float64)
    flat = isinstance(next(like.children()), nn.Linear)
    return (x.flatten(1) if flat else x).to(next(like.parameters()).dtype), torch.randint(3, (8,), generator=generator)


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(model(x).to(torch.promote_types(x.dtype, torch.float32)), y)


def closure_of(model: nn.Module, x: Tensor, y: Tensor, *, backward: bool = True) -> Closure:
    def closure() -> Tensor:
        loss = loss_of(model, x, y)
        if backward:
            loss.backward()  # type: ignore[no-untyped-call]
        return loss

    return closure


def backward(model: nn.Module, number: int, scaler: torch.amp.GradScaler | None = None) -> Tensor:
    """Run the pass of a loop that calls `backward` itself."""
    loss = loss_of(model, *batch(number, model))
    (loss if scaler is None else scaler.scale(loss)).backward()  # type: ignore[no-untyped-call]
    return loss.detach()


@dataclass
class Loop:
    """Somebody's training loop over one optimizer, whatever kind of closure that takes."""

    name: str
    model: nn.Module
    optimizer: TorchOptimizer
    takes: int
    passes: list[dict[str, Any]] = field(default_factory=list)

    def closures(self, number: int) -> list[Closure]:
        return [self._recorded(number, part) for part in range(self.takes)]

    def step(self, number: int, **options: Any) -> Tensor | None:
        closures = self.closures(number)
        return self.optimizer.step(closures[0] if self.takes == 1 else closures, **options)

    def _recorded(self, number: int, part: int) -> Closure:
        inner = closure_of(self.model, *batch(number, self.model, part), backward=not second_order(self.name))

        def closure() -> Tensor:
            self.passes.append({"number": number, "part": part, "weights": weights_of(self.model)})
            return inner()

        return closure


def loop(name: str, model: nn.Module, **changes: Any) -> Loop:
    options = {key: changes.pop(key) for key in ("bn_updates", "seed", "total_steps", "module") if key in changes}
    params = changes.pop("params", model)
    settings = settings_of(name, **changes)
    optimizer = TorchOptimizer(name, params, **{"total_steps": 20, **options}, **settings)
    return Loop(name, model, optimizer, batches_of(name, settings))


def weights_of(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def buffers_of(model: nn.Module) -> list[Tensor]:
    return [buffer.clone() for buffer in model.buffers()]


def same_bits(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return len(one) == len(other) and all(
        a.dtype == b.dtype and torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))
        for a, b in zip(one, other, strict=True)
        for kind in [integer[a.element_size()]]
    )


def tracked(model: nn.Module, layer: int = 1) -> int:
    assert isinstance(model, nn.Sequential)
    norm = model[layer]
    assert isinstance(norm, nn.BatchNorm1d)
    assert norm.num_batches_tracked is not None
    return int(norm.num_batches_tracked)


def flat_state(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return the state of every parameter in order, names sorted."""
    state = optimizer.state_dict()["state"]
    return [state[number][key].clone() for number in sorted(state) for key in sorted(state[number])]


def assert_same(one: Loop, other: Loop, *, buffers: bool = True) -> None:
    assert same_bits(weights_of(one.model), weights_of(other.model))
    assert same_bits(flat_state(one.optimizer), flat_state(other.optimizer))
    assert one.optimizer.state_dict()["flatmin"] == other.optimizer.state_dict()["flatmin"]
    if buffers:
        assert same_bits(buffers_of(one.model), buffers_of(other.model))


def assert_near(one: nn.Module, other: nn.Module, atol: float = 1e-12) -> None:
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.isfinite(a).all()
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


def of_torch(name: str, groups: Sequence[Mapping[str, Any]]) -> torch.optim.Optimizer:
    """Return torch's own optimizer with the settings of ours."""
    renamed = []
    for group in groups:
        own = {key: value for key, value in group.items() if key not in ("beta1", "beta2", "adam_eps")}
        if name != "sgd":
            own["betas"], own["eps"] = (group.get("beta1", 0.9), group.get("beta2", 0.999)), group.get("adam_eps", 1e-8)
        renamed.append(own if name != "sgd" else {"momentum": 0.9, **own})
    kinds: dict[str, Any] = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    made: torch.optim.Optimizer = kinds[name](renamed)
    return made


GROUPS: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "sgd": [
        {"lr": 0.3, "weight_decay": 0.0, "momentum": 0.9},
        {"lr": 0.03, "weight_decay": 0.1, "momentum": 0.0},
        {"lr": 0.1, "weight_decay": 0.01, "momentum": 0.5},
    ],
    "adam": [
        {"lr": 0.01, "weight_decay": 0.0, "beta1": 0.9, "beta2": 0.999, "adam_eps": 1e-8},
        {"lr": 0.03, "weight_decay": 0.1, "beta1": 0.5, "beta2": 0.9, "adam_eps": 1e-3},
        {"lr": 0.001, "weight_decay": 0.01, "beta1": 0.0, "beta2": 0.99, "adam_eps": 1e-8},
    ],
}


def groups_of(name: str, model: nn.Sequential, own: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one group per linear layer."""
    layers = [layer for layer in model if isinstance(layer, nn.Linear)]
    return [{"params": list(layer.parameters()), **one} for layer, one in zip(layers, own, strict=True)]


def climb(rule: str, weights: Sequence[Tensor], grads: Sequence[Tensor], mean: list[Tensor]) -> list[Tensor]:
    """Return the displacements of the sharpness-aware rules, tensor by tensor, as in the papers."""
    rho = 0.3
    if rule == "asam":
        metric = [w.abs() + 0.01 for w in weights]
        length = torch.sqrt(sum(((t * g) ** 2).sum() for t, g in zip(metric, grads, strict=True)))  # type: ignore[arg-type]
        return [rho * t * t * g / length for t, g in zip(metric, grads, strict=True)]
    if rule == "vasso":
        mean[:] = [0.6 * d + 0.4 * g for d, g in zip(mean, grads, strict=True)] if mean else list(grads)
    along = mean if rule == "vasso" else list(grads)
    length = torch.sqrt(sum((d**2).sum() for d in along))  # type: ignore[arg-type]
    return [rho * d / length for d in along]


def by_hand(
    rule: str, model: nn.Module, base: torch.optim.Optimizer, number: int, mean: list[Tensor], *, back: bool = True
) -> float:
    """Take one step of a hand-written loop: climb, second pass, back to the weights, torch's own base update."""
    base.zero_grad()
    loss = backward(model, number)
    weights = weights_of(model)
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    with torch.no_grad():
        for parameter, change in zip(model.parameters(), climb(rule, weights, grads, mean), strict=True):
            parameter.add_(change)
    base.zero_grad()
    backward(model, number)
    displaced = weights_of(model)
    with torch.no_grad():
        for parameter, weight in zip(model.parameters(), weights, strict=True):
            parameter.copy_(weight if back else parameter)
    base.step()
    if not back:
        with torch.no_grad():
            for parameter, weight, there in zip(model.parameters(), weights, displaced, strict=True):
                parameter.add_(weight - there)
    return float(loss)


def two_steps(own: Loop, number: int, scaler: torch.amp.GradScaler | None = None) -> None:
    """Take a step as the loops of the SAM community do."""
    own.optimizer.zero_grad()
    if own.name.partition("-")[0] in CLIMBING:
        backward(own.model, number, scaler)
    own.optimizer.first_step(zero_grad=True, scaler=scaler)
    backward(own.model, number, scaler)
    own.optimizer.second_step(zero_grad=True, scaler=scaler)


def through_a_file(saved: Any) -> Any:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
