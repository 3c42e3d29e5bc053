"""The second door: every optimizer as a `torch.optim.Optimizer`, for anybody's training loop.

    optimizer = TorchOptimizer("sam-sgd", model, lr=0.1, rho=0.05)

    def closure():
        loss = loss_function(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)

The arithmetic is that of the stacked trainer with one model in the stack.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flatmin.errors import RequestError, nearest
from flatmin.optimizers.compose import Composed, Plain
from flatmin.optimizers.interface import Evaluation, Step, answered
from flatmin.optimizers.torch_closures import closures_of, wanted
from flatmin.optimizers.torch_state import FlatState
from flatmin.optimizers.torch_step import Closure, Stepped, StepUnderWay
from flatmin.plugins import optimizer_parts
from flatmin.settings import REQUIRED
from flatmin.stack import Streams, stream_key

_SAVED = ("count", "seed", "total_steps", "bn_updates")
"""What `state_dict` holds beside the state and the groups; loading one sets them."""

_OF_TORCH = ("params", "param_names", "initial_lr")
"""Keys of a parameter group that torch and its schedulers put there."""


class TorchOptimizer(torch.optim.Optimizer):
    """A gradient rule over a base update, such as `sam-sgd`, as a torch optimizer.

    `step(closure)` evaluates the closure as often as the rule asks for. A closure computes the loss on its batch, calls
    `backward` on it and returns it; gradients are cleared before each call. For a second-order base (`adahessian`,
    `scrn`) it returns the loss without calling `backward`. A rule that takes several batches is given a list of
    closures, one per batch. `first_step` and `second_step` are for loops that call `backward` themselves. Weights are
    bit for bit what they were after every perturbation, also when a closure raises. Arithmetic and state are at least
    fp32, whatever the type of the weights.

    Args:
        name: A base update, or `rule-base`, as in a study.
        params: The module, or parameters or groups of them as torch takes them. A group may have its own value of any
            setting that is per model.
        module: The module, where `params` are not one: its BatchNorm statistics are looked after.
        bn_updates: Which passes of a step update BatchNorm's running statistics: `once`, the first over each batch;
            `all`, as in the published codes; `none`.
        seed: Seed of all noise. A stacked model whose `order_seed` is this draws the same.
        total_steps: Steps of the whole training, for settings that change over it (`lpf_increase`).
        **settings: The optimizer's settings, by their names in a study.

    Raises:
        RequestError: There is no such optimizer or setting, or a value cannot be taken.
    """

    def __init__(
        self,
        name: str,
        params: nn.Module | Iterable[Any],
        *,
        module: nn.Module | None = None,
        bn_updates: Literal["once", "all", "none"] = "once",
        seed: int = 0,
        total_steps: int | None = None,
        **settings: Any,
    ) -> None:
        if not isinstance(name, str):
            raise RequestError(f"the first argument is the optimizer's name, such as 'sam-sgd', not {name!r}")
        self.name = name
        self.module = params if isinstance(params, nn.Module) else module
        self.bn_updates, self.seed, self.total_steps = bn_updates, seed, total_steps
        self.count = 0
        self._parts = optimizer_parts(name)
        self._arguments = {key: value for part in self._parts for key, value in part.arguments.items()}
        self._flat = FlatState()
        self._pending: StepUnderWay | None = None
        self._passes: list[_Pass] = []
        defaults = {key: argument.default for key, argument in self._arguments.items()} | self._canonical(settings)
        missing = [key for key, value in defaults.items() if value is REQUIRED]
        if missing:
            raise RequestError(f"'{name}' needs {', '.join(missing)}")
        super().__init__(params.parameters() if isinstance(params, nn.Module) else params, defaults)
        self._check()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with its own value of any setting that is per model.

        Raises:
            RequestError: An unknown setting, one that must be the same for all groups, or complex or integer weights.
        """
        own = self._canonical({key: value for key, value in param_group.items() if key not in _OF_TORCH})
        for key, value in own.items():
            if not self._arguments[key].setting.per_model and value != self.defaults[key]:
                raise RequestError(f"{key} is the same for all groups of parameters, here {self.defaults[key]!r}")
        param_group.update(own)
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            if parameter.requires_grad and not parameter.is_floating_point():
                self.param_groups.pop()
                raise RequestError(f"'{self.name}' takes real floating-point parameters, not {parameter.dtype}")
        self._flat = FlatState()

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Closure | Sequence[Closure] | None = None,
        *,
        scaler: torch.amp.GradScaler | None = None,
        weights: Sequence[float] | None = None,
    ) -> Tensor | None:
        """Take one step and return the loss that the rule saw first, or None without a closure.

        Args:
            closure: What computes the loss of the step's batch; a list of them, one per batch, for a rule that takes
                several. May be left out by an optimizer that only needs the gradient at the weights: the one in `grad`
                is used.
            scaler: The GradScaler with which closures call `scaler.scale(loss).backward()`. A step in which a gradient
                overflows is skipped: weights and state stay as they are. Call `scaler.update()` afterwards.
            weights: How much each of several batches weighs, such as its number of examples; alike by default.

        Raises:
            RequestError: What is given is not what this optimizer takes; the message says what is.
        """
        if self._pending is not None:
            raise RequestError("first_step was called, so second_step comes before the next step")
        composed = self._composed()
        if closure is None and isinstance(composed.rule, Plain) and not composed.second_order:
            work = self._begin(composed, batches=1)
            self._apply(work, answered(work.stepping, lambda _: work.present()))
            return None
        closures = closures_of(self.name, composed, closure)
        shares = [1.0] * len(closures) if weights is None else [float(weight) for weight in weights]
        if len(shares) != len(closures):
            raise RequestError(f"there are {len(closures)} closures but {len(shares)} weights")
        if min(shares) < 0 or not 0 < sum(shares) < math.inf:
            raise RequestError(f"weights = {weights}: should be numbers from 0, not all of them 0")
        if scaler is not None and composed.second_order:
            raise RequestError(f"'{self.name}' takes no GradScaler: its closure does not call backward")
        work = self._begin(composed, len(closures))
        losses: list[Tensor] = []

        def evaluate(batch: int, hessian: bool) -> Evaluation:
            closure = closures[batch]
            with work.statistics_of(batch, self.bn_updates, hessian=hessian), torch.enable_grad():
                found = work.with_graph(closure, hessian=hessian) if composed.second_order else work.run(closure)
            losses.append(found.losses[0])
            if scaler is not None and not self._unscale(work, scaler, found, len(losses)):
                raise _Overflow
            return found

        try:
            stepped = work.answered(evaluate, shares)
        except _Overflow:
            return losses[0]
        finally:
            work.restore()
            work.restore_statistics()
        self._apply(work, stepped)
        return stepped[0][0]

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False, *, scaler: torch.amp.GradScaler | None = None) -> None:
        """Move to the weights at which the rule takes its gradient.

        For a rule that climbs along a gradient (`sam`, `asam`, `vasso`), call it after `backward` at the weights; for
        one that adds noise (`lpf`, `smoothout`), before the pass.

        Args:
            zero_grad: Whether to clear the gradients, for the pass that follows.
            scaler: The GradScaler, if the loss was scaled; gradients must not be unscaled yet.

        Raises:
            RequestError: This optimizer is not one of a first and a second step.
        """
        composed = self._composed()
        if self._pending is not None:
            raise RequestError("first_step was called already; second_step comes next")
        other = RequestError(f"'{self.name}' has no first and second step; it takes {wanted(composed)}")
        if composed.second_order or composed.rule.batches > 1 or isinstance(composed.rule, Plain):
            raise other
        if self.bn_updates == "none":
            raise RequestError("bn_updates = 'none' takes step(closure): the pass before first_step has updated them")
        work = self._begin(composed, batches=1)
        ask = next(work.stepping)
        if ask.at(0) is work.kept:
            found = work.present()
            work.seen.add(0)
            work.overflowed = scaler is not None and not self._unscale(work, scaler, found, 1)
            try:
                ask = work.stepping.send(found)
            except StopIteration:
                raise other from None
            del found.grad
            if self.bn_updates == "once":
                work.keep_statistics()
        if not work.overflowed:
            work.move_to(ask.at(0))
        self._pending = work
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False, *, scaler: torch.amp.GradScaler | None = None) -> None:
        """Return to the weights and take the step, with the gradients of the pass since `first_step`.

        Args:
            zero_grad: Whether to clear the gradients afterwards.
            scaler: The GradScaler, if the loss was scaled. Where a gradient of either pass overflowed, nothing changes.

        Raises:
            RequestError: There was no `first_step`.
        """
        if self._pending is None:
            raise RequestError("second_step comes after first_step")
        work, self._pending = self._pending, None
        work.restore()
        work.restore_statistics()
        found = work.present()
        overflowed = scaler is not None and not self._unscale(work, scaler, found, 2)
        if not (overflowed or work.overflowed):
            try:
                work.stepping.send(found)
            except StopIteration as end:
                self._apply(work, end.value)
            else:
                raise RequestError(f"'{self.name}' asks for more than two passes; it takes step(closure)")
        if zero_grad:
            self.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """Return everything a resumed run needs: groups, the state of rule and base, the seed and the step's number.

        Raises:
            RequestError: The weights are displaced, between `first_step` and `second_step`.
        """
        if self._pending is not None:
            raise RequestError("between first_step and second_step the weights are displaced: save after second_step")
        own = {"name": self.name, **{key: getattr(self, key) for key in _SAVED}}
        return {**super().state_dict(), "flatmin": own}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Raises:
            RequestError: It is of another optimizer, or the weights are displaced.
        """
        if self._pending is not None:
            raise RequestError("between first_step and second_step the weights are displaced: load after second_step")
        own = state_dict.get("flatmin", {"name": "another optimizer"})
        if own["name"] != self.name:
            raise RequestError(f"the state is of '{own['name']}', this is '{self.name}'")
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "flatmin"})
        for key in _SAVED:
            setattr(self, key, own[key])
        places = [parameter for group in self.param_groups for parameter in group["params"]]
        for parameter, saved in zip(_saved_order(state_dict), places, strict=True):
            # torch has rounded the state to the type of the weights
            for key, value in state_dict["state"].get(parameter, {}).items():
                self.state[saved][key] = value.to(saved.device, copy=True)
        self._flat = FlatState()

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy is made of."""
        if self._pending is not None:
            raise RequestError("between first_step and second_step the weights are displaced: copy after second_step")
        own = ("name", "module", "bn_updates", "seed", "total_steps", "count", "_parts", "_arguments")
        empty: dict[str, Any] = {"_flat": FlatState(), "_pending": None, "_passes": []}
        return {**super().__getstate__(), **{key: getattr(self, key) for key in own}, **empty}

    def _canonical(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        values = {}
        for key, value in settings.items():
            if key not in self._arguments:
                takes = ", ".join(f"{own}={argument.default}" for own, argument in self._arguments.items())
                raise RequestError(
                    f"'{self.name}' does not take '{key}'.{nearest(key, self._arguments)} It takes: {takes}"
                )
            try:
                values[key] = self._arguments[key].canonical(value)
            except ValueError as error:
                raise RequestError(f"{key} = {value!r}: {error}") from None
        return values

    def _check(self) -> None:
        if self.bn_updates not in ("once", "all", "none"):
            raise RequestError(f"bn_updates = {self.bn_updates!r}: should be 'once', 'all' or 'none'")
        if self.bn_updates == "none" and self.module is None:
            raise RequestError("bn_updates = 'none' needs the module: give it instead of its parameters, or as module=")
        if self.total_steps is not None and self.total_steps < 1:
            raise RequestError(f"total_steps = {self.total_steps}: should be 1 or more")
        composed = self._composed()
        if composed.second_order and composed.rule.batches > 1:
            raise RequestError(
                f"'{self.name}' with {composed.rule.batches} batches a step needs Hessian-vector products at several "
                "weights at once, which only a study's stacked trainer has"
            )

    def _composed(self) -> Composed:
        """Return the rule and the base with the settings as the groups have them now."""
        values: dict[str, Any] = {}
        for key, argument in self._arguments.items():
            own = [group[key] for group in self.param_groups]
            if not argument.setting.per_model or all(value == own[0] for value in own):
                values[key] = own[0]
            else:
                sizes = [sum(p.numel() for p in group["params"] if p.requires_grad) for group in self.param_groups]
                each = [
                    torch.full((1, size), float(value), dtype=self._dtype(), device=self._device())
                    for value, size in zip(own, sizes, strict=True)
                ]
                values[key] = torch.cat(each, dim=1)
        return Composed(self._parts, values)

    def _begin(self, composed: Composed, batches: int) -> StepUnderWay:
        """Return a step of so many batches, with no question asked yet."""
        work = StepUnderWay(self.name, self.module, self._trained(), self._dtype())
        state, counts = self._flat.load(work.parameters, work.kept, composed, self.state)
        key = torch.tensor([stream_key("optimizer", self.seed)], device=work.kept.device)
        step = Step(
            count=self.count,
            total=self.total_steps,
            lr_factor=1.0,
            batches=batches,
            hessian=composed.needs_hessian(self.count),
            streams=Streams(key, self.count),
            shapes=[tuple(parameter.shape) for parameter in work.parameters],
            dtype=work.dtype,
        )
        work.begin(composed.steps(work.kept, state, step), state, counts)
        return work

    def _trained(self) -> list[Tensor]:
        return [
            parameter
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.requires_grad and parameter.numel()
        ]

    def _device(self) -> torch.device:
        parameters: Iterator[Tensor] = (p for group in self.param_groups for p in group["params"])
        return next(parameters).device

    def _dtype(self) -> torch.dtype:
        dtype = torch.float32
        for parameter in self._trained():
            dtype = torch.promote_types(dtype, parameter.dtype)
        return dtype

    def _unscale(self, work: StepUnderWay, scaler: torch.amp.GradScaler, found: Evaluation, number: int) -> bool:
        """Divide a pass's gradients by the scale; return whether all are finite, which the scaler is told too."""
        if not scaler.is_enabled():
            return True
        while len(self._passes) < number:
            self._passes.append(_Pass())
        self._passes[number - 1].param_groups = [{"params": work.parameters}]
        scaler.unscale_(self._passes[number - 1])  # type: ignore[arg-type]
        found.grad = work.gradients()
        return bool(torch.isfinite(found.grad).all())

    def _apply(self, work: StepUnderWay, stepped: Stepped) -> None:
        """Write the new weights and state of a step, except of parameters that had no gradient."""
        _, params, state = stepped
        if not all(work.touched):
            moved = torch.repeat_interleave(torch.tensor(work.touched), torch.tensor(work.sizes)).to(params.device)
            state = {key: torch.where(moved, value, work.state[key]) for key, value in state.items()}
        for parameter, piece, touched in zip(
            work.parameters, torch.split(params[0], work.sizes), work.touched, strict=True
        ):
            if touched:
                parameter.copy_(piece.view_as(parameter))
        self._flat.store(work.parameters, state, work.counts, self.state)
        self.count += 1
        self._opt_called = True  # by which torch's schedulers know that a step came before theirs; second_step is one


class _Overflow(Exception):
    """A scaled gradient was not finite."""


class _Pass:
    """What a GradScaler takes for an optimizer: it unscales the gradients of each only once between two updates."""

    param_groups: list[dict[str, Any]]


def _saved_order(state_dict: Mapping[str, Any]) -> list[int]:
    return [number for group in state_dict["param_groups"] for number in group["params"]]
