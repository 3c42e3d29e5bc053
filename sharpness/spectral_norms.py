"""The sum over layers of the logarithm of the layer's spectral norm, sum_l ln ||A_l||_2: a control, not a sharpness.

It is the logarithm of the product, which bounds how much the layers together can stretch an input. A_l is what a linear
or convolutional layer does to its input without its bias; normalisation layers' scales are left out, as published, so
with them the scale of a layer before one is arbitrary. Frozen layers are left out too. Layers that share their weights
count one by one, and a layer that is run twice once. A dead layer (norm 0) makes it undefined.

`operator=convolution` takes a convolution as the linear map that it is on inputs of the network's size, with its
stride, padding and groups: ARPACK's Lanczos on A^T A, whose largest Ritz value theta with residual r bounds the error,
|ln ||A|| - ln(theta) / 2| <= -ln(1 - r / theta) / 2. Sedghi, Gupta and Long 2019 find the same for a circular
convolution of stride 1, which is what Dziugaite et al. 2020 use for their `fft` measures. `operator=reshaped` takes the
kernel as a matrix with a row per filter (Yoshida and Miyato 2017), exactly. Source: Bartlett et al. 2017; Jiang et al.
2020 and Dziugaite et al. 2020 sum ln ||A||^2, which is twice this.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor, nn
from torch.func import functional_call

from flatmin.errors import RequestError
from flatmin.settings import Setting
from flatmin.sharpness.arguments import Tolerance
from flatmin.sharpness.engine import Engine
from flatmin.sharpness.estimate import Estimate
from flatmin.sharpness.guards import generators_kept
from flatmin.sharpness.tensors import every_tensor
from flatmin.stack import normal, stream_key

REFUSES = {
    "data": "it is a norm of the weights, and looks at no example",
    "subset": "it is a norm of the weights, and looks at no example",
    "loss": "it is a norm of the weights, whatever the loss",
    "label_smoothing": "it is a norm of the weights, whatever the loss",
}

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
_DENSE = 32
"""Inputs of so few numbers are mapped one by one."""

_MOST_RESTARTS = 100


def spectral_norms(
    engine: Engine,
    *,
    operator: Annotated[
        Literal["convolution", "reshaped"],
        Setting(about="A convolution's matrix: what it does to an input, or its kernel with a row per filter."),
    ] = "convolution",
    tolerance: Tolerance = 0.001,
) -> Estimate:
    """Sum over layers of the logarithm of the layer's spectral norm.

    Deterministic: `stderr` is the sum of the layers' residual bounds, and 0 where no iteration is needed. `samples` are
    the layers, or the steps of their iterations.

    Args:
        engine: The models.
        operator: What a convolution's matrix is.
        tolerance: Residual bound at which a convolution's iteration stops, as a fraction of its squared norm.

    Raises:
        RequestError: A layer other than linear and convolutional ones has a weight matrix.
    """
    layers = list(_layers(engine))
    shapes = _input_shapes(engine) if operator == "convolution" else {}
    norms = [_layer(layer, shapes, operator, tolerance) for layer in layers]
    logarithms = torch.stack([norm.log for norm in norms]).sum(dim=0)
    errors = torch.stack([norm.error for norm in norms]).sum(dim=0)
    converged = torch.stack([norm.converged for norm in norms]).all(dim=0) & logarithms.isfinite().cpu()
    value = torch.where(logarithms.isfinite(), logarithms, torch.nan)
    stderr = torch.where(logarithms.isfinite(), errors, torch.nan)
    samples = torch.stack([norm.steps for norm in norms]).sum(dim=0)
    return Estimate(value.cpu(), stderr.cpu(), samples.cpu(), torch.zeros(len(engine), dtype=torch.float64), converged)


@dataclass(frozen=True)
class _Layer:
    """A layer of K models: where it is, the module, and its weights, float64 `[K, *shape]`."""

    path: str
    module: nn.Module
    weight: Tensor


@dataclass(frozen=True)
class _Norm:
    """The logarithm of a layer's norm, its error bound, the steps taken, and whether they did; each `[K]`."""

    log: Tensor
    error: Tensor
    steps: Tensor
    converged: Tensor


def _layers(engine: Engine) -> Iterator[_Layer]:
    """Yield the layers whose norms count.

    Raises:
        RequestError: A matrix belongs to another kind of layer, or there is none.
    """
    tensors = every_tensor(engine.network, engine.params, engine.buffers)
    found = False
    for path, module in engine.network.template.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            whole = f"{path}.{name}" if path else name
            if not parameter.requires_grad:
                continue
            if name == "weight" and isinstance(module, (nn.Linear, *_CONVOLUTIONS)):
                found = True
                yield _Layer(path, module, tensors[whole].double())
            elif parameter.dim() >= 2:
                raise RequestError(
                    f"the parameter '{whole}' of a {type(module).__name__} is a matrix, and of which map is known for "
                    "linear and convolutional layers only"
                )
    if not found:
        raise RequestError("the network trains no linear or convolutional layer, so there is no spectral norm")


def _input_shapes(engine: Engine) -> dict[str, torch.Size]:
    """Return the shape of one input of every convolution, by its path."""
    module = copy.deepcopy(engine.network.template).eval()
    shapes: dict[str, torch.Size] = {}

    def note(path: str) -> Callable[[nn.Module, Any], None]:
        def hook(_module: nn.Module, inputs: Any) -> None:
            shapes[path] = inputs[0].shape[1:]

        return hook

    for path, part in module.named_modules():
        if isinstance(part, _CONVOLUTIONS):
            part.register_forward_pre_hook(note(path))
    batch, weight = engine.batches[0], next(module.parameters())
    x = (batch.x if batch.shared else batch.x[0])[:1].to(weight.device)
    with torch.no_grad(), generators_kept(weight.device):
        module(x.to(weight.dtype) if x.is_floating_point() else x)
    return shapes


def _layer(layer: _Layer, shapes: dict[str, torch.Size], operator: str, tolerance: float) -> _Norm:
    if isinstance(layer.module, nn.Linear) or operator == "reshaped":
        return _of_matrix(layer)
    if layer.path not in shapes:
        raise RequestError(f"the layer '{layer.path}' is not run as a module, so the size of its input is not known")
    return _of_convolution(layer, shapes[layer.path], tolerance)


def _of_matrix(layer: _Layer) -> _Norm:
    """Return the exact norms of kernels with a row per filter."""
    weight = layer.weight
    if isinstance(layer.module, _TRANSPOSED):
        weight = weight.transpose(1, 2)
    matrix = weight.flatten(2)
    sound = matrix.isfinite().all(dim=(1, 2))
    norm = torch.linalg.matrix_norm(torch.where(sound[:, None, None], matrix, 0.0), ord=2)
    log = torch.where(sound, norm, torch.nan).log()
    return _Norm(log, torch.zeros_like(log), torch.ones_like(log, dtype=torch.int64), log.isfinite().cpu())


def _of_convolution(layer: _Layer, shape: torch.Size, tolerance: float) -> _Norm:
    """Return the norms of convolutions as maps of inputs of a shape, model by model."""
    start = normal(stream_key(f"spectral norm/{layer.path}"), shape).numpy()
    found = [_largest(_gram(layer.module, weight), start, weight, tolerance) for weight in layer.weight]
    theta, residual = (torch.tensor([one[part] for one in found], dtype=torch.float64) for part in range(2))
    steps = torch.tensor([one[2] for one in found])
    share = (residual / theta).clamp(max=1.0)
    log, error = theta.log() / 2, -torch.log1p(-share) / 2
    device = layer.weight.device
    return _Norm(log.to(device), error.to(device), steps.to(device), share <= tolerance)


def _gram(module: nn.Module, weight: Tensor) -> Callable[[Tensor], Tensor]:
    """Return x -> A^T A x for a convolution without its bias, on one input."""
    tensors = {"weight": weight}
    if isinstance(module.bias, Tensor):
        tensors["bias"] = torch.zeros_like(module.bias, dtype=weight.dtype, device=weight.device)

    def product(x: Tensor) -> Tensor:
        with torch.enable_grad():
            at = x[None].detach().requires_grad_()
            y = functional_call(module, tensors, (at,))
            (pulled,) = torch.autograd.grad(y, at, y.detach())
        return pulled[0].detach()

    return product


def _largest(
    product: Callable[[Tensor], Tensor], start: NDArray[np.float64], weight: Tensor, tolerance: float
) -> tuple[float, float, int]:
    """Return the largest eigenvalue of x -> A^T A x, its residual for a unit eigenvector, and the products taken."""
    if not bool(weight.isfinite().all()):
        return math.nan, math.nan, 0
    steps = 0

    def of_array(x: NDArray[np.float64]) -> NDArray[np.float64]:
        nonlocal steps
        steps += 1
        out: NDArray[np.float64] = product(torch.from_numpy(x).reshape(start.shape).to(weight.device)).cpu().numpy()
        return out.reshape(-1)

    size = start.size
    if size <= _DENSE:
        dense = np.stack([of_array(row) for row in np.eye(size)])
        return float(np.linalg.eigvalsh((dense + dense.T) / 2)[-1]), 0.0, steps
    operator = LinearOperator((size, size), matvec=of_array, dtype=np.float64)
    try:
        values, vectors = eigsh(operator, k=1, v0=start.reshape(-1), tol=tolerance / 10, maxiter=_MOST_RESTARTS)
    except ArpackNoConvergence:
        return math.nan, math.nan, steps
    theta, vector = float(values[0]), vectors[:, 0]
    return theta, float(np.linalg.norm(of_array(vector) - theta * vector)), steps
