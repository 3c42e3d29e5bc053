"""The metric: in which units a displacement of the weights is measured.

A metric is a diagonal D, one number per weight. Functionals live at w + D u, so u is what a measure sees: its
gradient is D grad L, its Hessian D H D. `filter` is the balancing of Bisla et al. 2022 without the surgery:
dividing a filter by D_j and multiplying its output by D_j makes an isotropic u act as D u does here. Nothing
is ever divided by D, so that a dead filter (D = 0) stays where it is.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from flatmin.sharpness.tensors import first_names
from flatmin.stack import StackedNetwork

Metric = Literal["identity", "filter", "element"]

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_FILTERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def scale(network: StackedNetwork, params: Tensor, metric: Metric) -> Tensor:
    """Return the metric's diagonal D of K models, float64 `[K, d]`, never negative.

    Args:
        network: The network of the models, whose modules say what a filter is.
        params: Weights `[K, d]`.
        metric: `identity`: 1. `element`: |w|. `filter`: ||w_j|| + |b_j| for every weight and the bias of
            filter (row) j of a convolution or linear layer, |gamma| + |beta| for both of a channel of a
            normalisation layer, and the norm of the whole tensor for any other parameter. What modules share is
            scaled as the first of them has it.

    Raises:
        ValueError: There is no such metric.
    """
    wide = params.detach().double()
    if metric == "identity":
        return torch.ones_like(wide)
    if metric == "element":
        return wide.abs()
    if metric != "filter":
        raise ValueError(f"there is no metric '{metric}'; valid: identity, filter, element")
    views, first = network.views(wide), first_names(network.template)
    scales: dict[str, Tensor] = {}
    for path, module in network.template.named_modules():
        prefix = f"{path}." if path else ""
        names = {name: first[prefix + name] for name, _ in module.named_parameters(recurse=False)}
        own = {name: views[whole] for name, whole in names.items() if whole in views}
        for name, value in _of_module(module, own).items():
            scales.setdefault(names[name], value)
    return torch.cat([scales[name].expand_as(views[name]).flatten(1) for name in network.names], dim=1)


def _of_module(module: nn.Module, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the scales of a module's own parameters `[K, *shape]`, each broadcastable to its parameter."""
    scales = {name: _norm(value, keep=()) for name, value in own.items()}
    weight, bias = own.get("weight"), own.get("bias")
    axis = _filter_axis(module, weight)
    if weight is None or axis is None:
        return scales
    per_filter = _norm(weight, keep=(axis,)).flatten(1)
    if bias is not None:
        per_filter = per_filter + bias.abs()
        scales["bias"] = per_filter
    shape = [len(weight)] + [-1 if place == axis else 1 for place in range(1, weight.dim())]
    scales["weight"] = per_filter.reshape(shape)
    return scales


def _filter_axis(module: nn.Module, weight: Tensor | None) -> int | None:
    """Return the axis of the stacked weight `[K, ...]` that counts filters or channels, if it has one."""
    if weight is None:
        return None
    if isinstance(module, _FILTERS) or weight.dim() == 2:
        return 1
    if isinstance(module, _TRANSPOSED) and module.groups == 1:
        return 2
    return None


def _norm(value: Tensor, keep: tuple[int, ...]) -> Tensor:
    """Return L2 norms over all axes but the model's and those kept, with singleton axes in their place."""
    axes = [axis for axis in range(1, value.dim()) if axis not in keep]
    return value.square().sum(dim=axes, keepdim=True).sqrt() if axes else value.abs()
