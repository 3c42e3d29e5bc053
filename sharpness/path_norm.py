"""The path norm: the root of the sum, over all paths from an input to an output, of the product of squared weights.

    path_norm = sqrt(sum_c f_{w^2}(1)_c)

with f_{w^2} the network with every weight squared, on an input of ones; in the units of an output per unit of every
input. A control, not a sharpness. Source: Neyshabur, Tomioka and Srebro 2015 (the L2 path norm); Jiang et al. 2020 and
Dziugaite et al. 2020 leave the root away (same ranks).

What is done with what is no plain weight:

- A bias is a path that starts at its unit, so its square is added there.
- A frozen weight is a weight like any other: a path goes through it.
- BatchNorm in eval mode is affine, a x + c with a = gamma / sqrt(var + eps) and c = beta - a mean. Its paths have the
  weight a, and c is a bias: a^2 x + c^2. The published code squares gamma and beta and keeps the running mean and
  variance as they are, which is no path norm, and can be negative.
- Skip connections and ReLU need nothing: the squared network has no negative number. An average pool passes on the mean
  of its inputs and a maximum the largest, as in the network itself and in the published code; so does any number that
  the network multiplies with.

A network that is no sum over such paths has no path norm, and is refused: with layers that are not positively
homogeneous (tanh, ELU, attention, ...), with normalisation by the example (LayerNorm, GroupNorm, ...), with a path
that counts negatively (one branch less another), and with weights that are computed from others (weight normalisation).
All are found by trying the network with random weights: g(2^k x) = 2^k g(x) without biases must hold for inputs and
weights of either sign, and with positive ones no output may fall where an input or a weight rises.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from flatmin.errors import RequestError
from flatmin.sharpness.engine import Engine
from flatmin.sharpness.estimate import Estimate, exact
from flatmin.sharpness.tensors import every_tensor, first_names
from flatmin.stack import Batch, normal, stream_key

REFUSES = {
    "data": "it is a norm of the weights, and looks at no example",
    "subset": "it is a norm of the weights, and looks at no example",
    "loss": "it is a norm of the weights, whatever the loss",
    "label_smoothing": "it is a norm of the weights, whatever the loss",
}

_BATCH_NORM = nn.modules.batchnorm._BatchNorm
_BY_EXAMPLE = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
    nn.modules.instancenorm._InstanceNorm,
)
"""Of an input of one number per group they make 0, which is homogeneous."""

_AGREE = 1e-9
_TRIES = 2
_FACTOR = 2.0**6

Power = Callable[[Tensor], Tensor]


def path_norm(engine: Engine) -> Estimate:
    """Root of the sum over all paths of the product of squared weights.

    Args:
        engine: The models.

    Raises:
        RequestError: The network takes no real numbers, or is no sum over paths.
    """
    template = engine.batches[0]
    shape = template.x.shape[1:] if template.shared else template.x.shape[2:]
    if not template.x.is_floating_point():
        raise RequestError(f"the network takes {template.x.dtype} and no real numbers, so it has no path norm")
    _check_modules(engine.network.template)
    _check_paths(engine, shape)
    ones = torch.ones(1, *shape, dtype=torch.float64, device=engine.device)
    with torch.no_grad():
        value = (
            _outputs(
                engine,
                _changed(engine, every_tensor(engine.network, engine.params, engine.buffers), torch.square),
                ones,
            )
            .flatten(1)
            .sum(dim=1)
        )
    return exact(value.sqrt().cpu(), passes=0.0)


def _changed(
    engine: Engine, tensors: Mapping[str, Tensor], power: Power, *, constants: bool = True
) -> dict[str, Tensor]:
    """Return the tensors of networks whose weights are a power of what they were, float64 `[K, ...]`.

    Args:
        engine: The models.
        tensors: What they were, by every name.
        power: The power.
        constants: Whether biases are taken to the power too; else they are zero.
    """
    template = engine.network.template
    wide = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    weights = {name for name, _ in template.named_parameters(remove_duplicate=False)}
    result = {
        name: power(tensor) if name in weights and tensor.is_floating_point() else tensor
        for name, tensor in wide.items()
    }
    for path, module in template.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(module, _BATCH_NORM):
            result.update(_changed_norm(prefix, module, wide, power, constants=constants))
        elif not constants and f"{prefix}bias" in result:
            result[f"{prefix}bias"] = torch.zeros_like(result[f"{prefix}bias"])
    return result


def _changed_norm(
    prefix: str, module: nn.Module, wide: Mapping[str, Tensor], power: Power, *, constants: bool
) -> dict[str, Tensor]:
    """Return the tensors with which a BatchNorm in eval mode computes a^2 x + c^2, or a^2 x."""
    assert isinstance(module, _BATCH_NORM)
    mean, spread = wide[f"{prefix}running_mean"], wide[f"{prefix}running_var"] + module.eps
    gamma, beta = wide.get(f"{prefix}weight"), wide.get(f"{prefix}bias")
    a = (torch.ones_like(mean) if gamma is None else gamma) / spread.sqrt()
    c = (torch.zeros_like(mean) if beta is None else beta) - a * mean
    slope, constant = power(a), power(c) if constants else torch.zeros_like(c)
    if gamma is None or beta is None:
        return {
            f"{prefix}running_mean": -torch.where(slope == 0, 0.0, constant / slope),
            f"{prefix}running_var": power(spread.rsqrt()).pow(-2) - module.eps,
        }
    return {
        f"{prefix}running_mean": torch.zeros_like(mean),
        f"{prefix}running_var": torch.full_like(spread, 1.0 - module.eps),
        f"{prefix}weight": slope,
        f"{prefix}bias": constant,
    }


def _outputs(engine: Engine, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Return the outputs `[K, b, ...]` of K networks whose tensors are given by name, on inputs `[b, ...]`."""
    network = engine.network
    models = len(tensors[network.names[0]])
    params = torch.cat([tensors[name].reshape(models, -1) for name in network.names], dim=1)
    buffers = {name: tensors[name] for name in engine.buffers}
    y = engine.batches[0].y
    return network.logits(params, buffers, Batch(x, y.new_zeros(models, len(x), *y.shape[2:]), shared=True))


def _check_modules(template: nn.Module) -> None:
    """Refuse layers that are known to leave no paths.

    Raises:
        RequestError: There is one.
    """
    first = first_names(template)
    for path, module in template.named_modules():
        if isinstance(module, _BY_EXAMPLE):
            raise RequestError(
                f"the layer '{path}' ({type(module).__name__}) normalises each example, which is not homogeneous, so "
                "the network has no path norm"
            )
        names = [f"{path}.{name}" if path else name for name, _ in module.named_parameters(recurse=False)]
        if isinstance(module, _BATCH_NORM) and any(first[name] != name for name in names):
            raise RequestError(f"the BatchNorm '{path}' shares its weights with another, and has no path norm here")


def _check_paths(engine: Engine, shape: tuple[int, ...]) -> None:
    """Refuse a network that is no sum over paths with positive weights, whatever its layers are called.

    Raises:
        RequestError: It is not.
    """
    x = normal(stream_key("path norm"), (_TRIES, *shape)).to(engine.device, torch.float64)
    tensors = _random(engine)
    try:
        with torch.no_grad():
            _check_homogeneous(engine, _changed(engine, tensors, lambda tensor: tensor, constants=False), x)
        squared = _changed(engine, tensors, torch.square, constants=False)
        with torch.no_grad():
            _check_homogeneous(engine, squared, x.abs())
        _check_rising(engine, squared, x.abs())
    except RuntimeError as error:
        raise RequestError(f"the network cannot be evaluated with squared weights in float64: {error}") from error


def _random(engine: Engine) -> dict[str, Tensor]:
    """Return tensors of one model, weights of either sign that keep the size of what goes through, `[1, ...]`."""
    template = engine.network.template
    weights, firsts = dict(template.named_parameters()), first_names(template)
    drawn = {}
    for name, tensor in every_tensor(engine.network, engine.params, engine.buffers).items():
        first = firsts[name]
        if first not in weights or not tensor.is_floating_point():
            drawn[name] = tensor[:1]
            continue
        z = normal(stream_key(f"path norm/{first}"), tuple(tensor.shape[1:])).to(engine.device, torch.float64)
        fan_in = tensor[0, 0].numel() if tensor.dim() > 2 else 1
        drawn[name] = ((z.sign() + 0.3 * z) / fan_in**0.5)[None]
    for path, module in template.named_modules():
        if isinstance(module, _BATCH_NORM):
            variance = f"{path}.running_var" if path else "running_var"
            drawn[variance] = torch.ones_like(drawn[variance])
    return drawn


def _check_homogeneous(engine: Engine, tensors: Mapping[str, Tensor], x: Tensor) -> None:
    once, scaled = _outputs(engine, tensors, x), _outputs(engine, tensors, _FACTOR * x)
    if not bool(((scaled / _FACTOR - once).abs() <= _AGREE * once.abs().amax()).all()):
        raise RequestError(
            "without its biases the network does not double its output with its input, so a layer of it is not "
            "homogeneous (tanh, GELU, softmax, a clipped ReLU, ...), and it has no path norm"
        )


def _check_rising(engine: Engine, squared: Mapping[str, Tensor], x: Tensor) -> None:
    """Refuse a network whose output falls where a positive weight or input of it rises."""
    names = [name for name in engine.network.names if squared[name].is_floating_point()]
    moved = [x.requires_grad_(), *(squared[name].requires_grad_() for name in names)]
    outputs = _outputs(engine, squared, x)
    weights = 1.0 + normal(stream_key("path norm outputs"), tuple(outputs.shape)).abs().to(outputs)
    found = torch.autograd.grad((weights * outputs).sum(), moved, allow_unused=True)
    for gradient in found:
        if gradient is not None and bool((gradient < -_AGREE * gradient.abs().amax()).any()):
            raise RequestError(
                "with positive weights and inputs an output of the network falls where one of them rises (a branch is "
                "subtracted, or weights are computed from others), so it is no sum over paths, and has no path norm"
            )
