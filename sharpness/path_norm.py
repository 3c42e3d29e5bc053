"""The path norm: the root of the sum, over all paths from an input to an output, of the product of squared weights.

    path_norm = sqrt(sum_c f_{w^2}(1)_c)

with f_{w^2} the network with every weight squared, on an input of ones; in the units of an output per unit of every
input. A control, not a sharpness. Source: Neyshabur, Tomioka and Srebro 2015 (the L2 path norm); Jiang et al. 2020 and
Dziugaite et al. 2020 leave the root away (same ranks).

What is done with what is no plain weight:

- A bias is a path that starts at its unit, so its square is added there.
- BatchNorm in eval mode is affine, a x + c with a = gamma / sqrt(var + eps) and c = beta - a mean. Its paths have the
  weight a, and c is a bias: a^2 x + c^2. The published code squares gamma and beta and keeps the running mean and
  variance as they are, which is no path norm, and can be negative.
- Skip connections and ReLU need nothing: the squared network has no negative number. An average pool passes on the mean
  of its inputs and a maximum the largest, as in the network itself and in the published code.
- Layers that are not homogeneous (tanh, LayerNorm, attention, ...) have no path norm, and are refused.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flatmin.errors import FlatminError
from flatmin.sharpness.engine import Engine
from flatmin.sharpness.estimate import Estimate, exact
from flatmin.stack import Batch

REFUSES = {
    "data": "it is a norm of the weights, and looks at no example",
    "subset": "it is a norm of the weights, and looks at no example",
    "loss": "it is a norm of the weights, whatever the loss",
    "label_smoothing": "it is a norm of the weights, whatever the loss",
}

_BATCH_NORM = nn.modules.batchnorm._BatchNorm
_AGREE = 1e-9


def path_norm(engine: Engine) -> Estimate:
    """Root of the sum over all paths of the product of squared weights.

    Args:
        engine: The models.

    Raises:
        FlatminError: The network takes no real numbers, or is not homogeneous, so that it has no paths.
    """
    template = engine.batches[0]
    shape = template.x.shape[1:] if template.shared else template.x.shape[2:]
    if not template.x.is_floating_point():
        raise FlatminError(f"the network takes {template.x.dtype} and no real numbers, so it has no path norm")
    ones = torch.ones(1, *shape, dtype=torch.float64, device=engine.device)
    squared, linear = _squared(engine, constants=True), _squared(engine, constants=False)
    _check_homogeneous(engine, linear, ones)
    value = _outputs(engine, squared, ones).flatten(1).sum(dim=1).sqrt()
    return exact(value.cpu(), passes=0.0)


def _squared(engine: Engine, *, constants: bool) -> dict[str, Tensor]:
    """Return the tensors of the squared networks by name, float64 `[K, ...]`; biases too, or zero for them."""
    network = engine.network
    tensors = {**network.views(engine.params), **engine.buffers}
    wide = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    weights = {name for name, _ in network.template.named_parameters(remove_duplicate=False)}
    result = {name: tensor.square() if name in weights else tensor for name, tensor in wide.items()}
    for path, module in network.template.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(module, _BATCH_NORM):
            result.update(_squared_norm(prefix, module, wide, constants=constants))
        elif not constants and f"{prefix}bias" in result:
            result[f"{prefix}bias"] = torch.zeros_like(result[f"{prefix}bias"])
    return result


def _squared_norm(prefix: str, module: nn.Module, wide: dict[str, Tensor], *, constants: bool) -> dict[str, Tensor]:
    """Return the tensors with which a BatchNorm in eval mode computes a^2 x + c^2, or a^2 x."""
    assert isinstance(module, _BATCH_NORM)
    mean, spread = wide[f"{prefix}running_mean"], wide[f"{prefix}running_var"] + module.eps
    gamma, beta = wide.get(f"{prefix}weight"), wide.get(f"{prefix}bias")
    a = (torch.ones_like(mean) if gamma is None else gamma) / spread.sqrt()
    c = (torch.zeros_like(mean) if beta is None else beta) - a * mean
    constant = c.square() if constants else torch.zeros_like(c)
    if gamma is None or beta is None:
        return {f"{prefix}running_mean": -constant * spread, f"{prefix}running_var": spread.square() - module.eps}
    return {
        f"{prefix}running_mean": torch.zeros_like(mean),
        f"{prefix}running_var": torch.full_like(spread, 1.0 - module.eps),
        f"{prefix}weight": a.square(),
        f"{prefix}bias": constant,
    }


def _outputs(engine: Engine, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    """Return the outputs `[K, 1, ...]` of K networks whose tensors are given by name."""
    network, models = engine.network, len(engine)
    params = torch.cat([tensors[name].reshape(models, -1) for name in network.names], dim=1)
    buffers = {name: tensor for name, tensor in tensors.items() if name not in network.names}
    with torch.no_grad():
        return network.logits(params, buffers, Batch(x, engine.batches[0].y[:, :1], shared=True))


def _check_homogeneous(engine: Engine, linear: dict[str, Tensor], ones: Tensor) -> None:
    """Refuse a network that, squared and without biases, does not double its output with its input.

    Raises:
        FlatminError: It does not.
    """
    try:
        once, twice = _outputs(engine, linear, ones), _outputs(engine, linear, 2 * ones)
    except RuntimeError as error:
        raise FlatminError(f"the network cannot be evaluated with squared weights in float64: {error}") from error
    finite = once.isfinite() & twice.isfinite()
    wrong = finite & ((twice - 2 * once).abs() > _AGREE * twice.abs())
    if bool(wrong.any()):
        raise FlatminError(
            "the network with squared weights and without biases does not double its output with its input, so a layer "
            "of it is not homogeneous (tanh, LayerNorm, softmax, ...), and it has no path norm"
        )
