"""Networks that are a chain of linear layers, ReLUs and dropout: K models at once, their derivatives written out.

Layer i makes h_{i+1} = m_i * a_i of h_i, with a_i = h_i W_i^T + b_i and a mask m_i: 0 where the ReLU or the dropout
cuts, and elsewhere 1, over 1 - p behind a dropout. With e_i, the derivative of a model's loss by a_i:

    dL/dW_i = e_i^T h_i,   dL/db_i = 1^T e_i,   e_{i-1} = m_{i-1} * (e_i W_i).

A Hessian-vector product is the derivative of these lines along a direction (Pearlmutter 1994, section 3), in which the
masks are constants. A single weight enters the outputs z linearly, so the Hessian's diagonal is the Gauss-Newton
matrix's: with B_i = dz/da_i and S_z, the Hessian of an example's loss by z,

    d^2L/dW_i^2 = sum over examples of diag(B_i^T S_z B_i) (h_i^2)^T.

Each product of matrices is one for all models, and gradients are written where they belong in
`[K, d]`; autograd, which records, turns round and copies, takes about twice as long for MLPs on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import vmap

from flatmin.pulse import beat
from flatmin.stack.streams import Streams, dropout_mask

_FEW_OUTPUTS = 20
"""On a CPU a product of matrices with so few columns is up to twice as fast turned over, with so few rows: 10 of them
by 2 times, 20 by 1.2, 32 no longer (one core of an EPYC with AVX-512, batches of 32 and 128, widths 48 to 192)."""

_CACHED_NUMBERS = 2**18
"""Numbers that stay in the cache of a CPU's core: 1 MiB of fp32."""


@dataclass(frozen=True)
class _Layer:
    """A linear layer and what follows it.

    Attributes:
        module: The layer.
        relu: Whether a ReLU follows.
        dropped: The probability of the dropout that follows; 0 where there is none.
    """

    module: nn.Linear
    relu: bool = False
    dropped: float = 0.0


@dataclass(frozen=True)
class There:
    """What the pass through the networks leaves for the way back.

    Attributes:
        outputs: `[K, b, classes]`.
        inputs: Those of each layer, `[K, b, in]`.
        factors: What each layer's dropout multiplies by, `[K, b, out]`; None where there is none.
        weights: The matrix `[K, out, in]` and bias `[K, 1, out]` of each layer.
    """

    outputs: Tensor
    inputs: Sequence[Tensor]
    factors: Sequence[Tensor | None]
    weights: Sequence[tuple[Tensor, Tensor | None]]


class Chain:
    """A chain of linear layers; `Chain.of` finds it in a module."""

    def __init__(self, layers: Sequence[_Layer], *, flattens: bool) -> None:
        self._layers, self._flattens = tuple(layers), flattens
        self._sizes = [parameter.numel() for layer in layers for parameter in layer.module.parameters()]
        self._shapes = [(-1, *layer.module.weight.shape) for layer in layers]

    @staticmethod
    def of(module: nn.Module) -> Chain | None:
        """Return the chain that a module is, or None where it is anything else.

        It may flatten its inputs first. Behind each linear layer but the last may be a ReLU, and then a dropout. With a
        subclass, a hook, a forward of its own, a parameter that does not train, one that two layers share, or a weight
        behind its bias (as pruning leaves it), it is something else.
        """
        parts = [part for part in module.modules() if type(part) is not nn.Sequential]
        flattens = bool(parts) and type(parts[0]) is nn.Flatten and (parts[0].start_dim, parts[0].end_dim) == (1, -1)
        layers: list[_Layer] = []
        for part in parts[flattens:]:
            last = layers[-1] if layers else None
            if type(part) is nn.Linear:
                layers.append(_Layer(part))
            elif type(part) is nn.ReLU and last and not last.relu and not last.dropped:
                layers[-1] = replace(last, relu=True)
            elif type(part) is nn.Dropout and last and not last.dropped:
                layers[-1] = replace(last, dropped=part.p)
            else:
                return None
        parameters = list(module.parameters())
        plain = (
            list(_in_order(module)) == parts
            and sum(len(list(layer.module.parameters())) for layer in layers) == len(parameters)
            and all(parameter.requires_grad for parameter in parameters)
            and all([*dict(layer.module.named_parameters())] in (["weight"], ["weight", "bias"]) for layer in layers)
            and not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
            and not any("forward" in vars(part) for part in module.modules())
        )
        ends = bool(layers) and not layers[-1].relu and not layers[-1].dropped
        return Chain(layers, flattens=flattens) if plain and ends else None

    @property
    def n_outputs(self) -> int:
        """How many outputs a network has."""
        return self._layers[-1].module.out_features

    def takes(self, x: Tensor) -> bool:
        """Return whether examples `[K, b, ...]` have the shape that a pass is written for."""
        return self._flattens or x.dim() == 3

    def forward(self, params: Tensor, x: Tensor, streams: Streams | None = None) -> There:
        """Pass examples through the networks; autograd sees nothing of it.

        Args:
            params: Weights `[K, d]`.
            x: Examples `[K, b, ...]`.
            streams: What dropout draws from; None in eval mode.
        """
        h, drawn = x.flatten(2), 0
        inputs: list[Tensor] = []
        factors: list[Tensor | None] = []
        with torch.no_grad():
            weights = self._views(params)
            for layer, (weight, bias) in zip(self._layers, weights, strict=True):
                inputs.append(h)
                h = _times(h, weight, bias)
                if layer.relu:
                    h.relu_()
                factor = None
                if layer.dropped and streams is not None:
                    drawn += 1
                    factor = _dropout(streams, drawn, h, layer.dropped)
                    h.mul_(factor)
                factors.append(factor)
        return There(h, inputs, factors, weights)

    def outputs(self, params: Tensor, x: Tensor) -> Tensor:
        """Return what the networks make of examples in eval mode, `[K, b, classes]`; arguments as in `forward`.

        On a CPU some models go after the others, as many as their activations stay in its cache.
        """
        widest = max(max(layer.module.weight.shape) for layer in self._layers)
        at_once = max(1, _CACHED_NUMBERS // max(1, x.shape[1] * widest)) if params.is_cpu else len(params)
        if at_once >= len(params):
            return self.forward(params, x).outputs
        pieces = zip(torch.split(params, at_once), torch.split(x, at_once), strict=True)
        made = [self.forward(*piece).outputs for piece in pieces]
        turned = made[0].stride(1) == 1  # as `_times` leaves a few outputs, and a softmax wants them
        return torch.cat([each.mT for each in made]).mT if turned else torch.cat(made)

    def backward(self, there: There, slope: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the gradients of the losses, `[K, d]`, and their derivatives by what each layer computes.

        Args:
            there: What `forward` returned.
            slope: The derivative of each model's loss by its outputs, `[K, b, classes]`.
        """
        grad = slope.new_empty(len(slope), sum(self._sizes))
        slopes = [slope] * len(self._layers)
        with torch.no_grad():
            views = list(zip(there.weights, self._views(grad), strict=True))
            for i, ((weight, _), into) in reversed(list(enumerate(views))):
                self._write(into, slopes[i], there.inputs[i])
                if i:
                    slopes[i - 1] = self._behind(i - 1, torch.bmm(slopes[i], weight), there)
        return grad, slopes

    def product(self, there: There, slopes: Sequence[Tensor], curved: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
        """Return the Hessians of the losses times vectors, `[K, d]`.

        Args:
            there: What `forward` returned.
            slopes: What `backward` returned.
            curved: Maps a change of the outputs `[K, b, classes]` to that of the losses' derivatives by them.
            v: The vectors, `[K, d]`.
        """
        result = torch.empty_like(v)
        with torch.no_grad():
            own, along, into = there.weights, self._views(v), self._views(result)
            changes: list[Tensor] = []  # of what goes into each layer but the first, which is the same
            change = self._moved(0, there, None, own[0], along[0])
            for i in range(1, len(self._layers)):
                changes.append(self._behind(i - 1, change, there))
                change = self._moved(i, there, changes[-1], own[i], along[i])
            slope = curved(change)
            for i in reversed(range(len(self._layers))):
                self._write(into[i], slope, there.inputs[i])
                if i:
                    into[i][0].baddbmm_(slopes[i].mT, changes[i - 1])
                    back = torch.bmm(slope, own[i][0]).baddbmm_(slopes[i], along[i][0])
                    slope = self._behind(i - 1, back, there)
        return result

    def diagonal(self, there: There, curved: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the diagonals of the Hessians of the losses, `[K, d]`; arguments as in `product`."""
        outputs = there.outputs
        result = outputs.new_empty(len(outputs), sum(self._sizes))
        with torch.no_grad():
            found = [outputs.new_zeros(*outputs.shape[:2], layer.module.out_features) for layer in self._layers]
            for number in range(self.n_outputs):
                beat()
                unit = torch.zeros_like(outputs)
                unit[..., number] = 1.0
                both = [unit, curved(unit)]
                for i in reversed(range(len(self._layers))):
                    found[i].addcmul_(*both)
                    if i:
                        both = [self._behind(i - 1, torch.bmm(each, there.weights[i][0]), there) for each in both]
            for squares, inputs, into in zip(found, there.inputs, self._views(result), strict=True):
                self._write(into, squares, inputs.square())
        return result

    def _moved(
        self,
        i: int,
        there: There,
        change: Tensor | None,
        own: tuple[Tensor, Tensor | None],
        along: tuple[Tensor, Tensor | None],
    ) -> Tensor:
        """Return the change of what a layer computes, when its inputs and its weights change."""
        (weight, _), (v, bias) = own, along
        moved = _times(there.inputs[i], v, bias)
        return moved if change is None else moved.baddbmm_(change, weight.mT)

    def _behind(self, i: int, change: Tensor, there: There) -> Tensor:
        """Return a change of what layer `i` computes, as its ReLU and its dropout pass it on; the same both ways."""
        factor = there.factors[i]
        if factor is not None:
            change = change.mul_(factor)
        if not self._layers[i].relu:
            return change
        passed: Tensor = torch.ops.aten.threshold_backward(change, there.inputs[i + 1], 0)
        return passed

    def _write(self, into: tuple[Tensor, Tensor | None], slope: Tensor, inputs: Tensor) -> None:
        """Write the derivatives by a layer's weights where they belong."""
        weight, bias = into
        torch.bmm(slope.mT, inputs, out=weight)
        if bias is not None:
            torch.sum(slope, dim=1, keepdim=True, out=bias)

    def _views(self, params: Tensor) -> list[tuple[Tensor, Tensor | None]]:
        """Return the matrices `[K, out, in]` and biases `[K, 1, out]` of each layer in a buffer `[K, d]`."""
        pieces = iter(params.split_with_sizes(self._sizes, dim=1))
        found: list[tuple[Tensor, Tensor | None]] = []
        for layer, shape in zip(self._layers, self._shapes, strict=True):
            weight = next(pieces).view(shape)
            found.append((weight, None if layer.module.bias is None else next(pieces).unsqueeze(1)))
        return found


def _times(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return h W^T + b, its examples last in memory where it has few columns."""
    if h.is_cpu and weight.shape[1] <= _FEW_OUTPUTS:
        return (torch.bmm(weight, h.mT) if bias is None else torch.baddbmm(bias.mT, weight, h.mT)).mT
    return torch.bmm(h, weight.mT) if bias is None else torch.baddbmm(bias, h, weight.mT)


def _in_order(module: nn.Module) -> Iterator[nn.Module]:
    """Return the parts of a nested sequence as they are run, one that is run twice twice."""
    if type(module) is not nn.Sequential:
        yield module
        return
    for part in module:
        yield from _in_order(part)


def _dropout(streams: Streams, drawn: int, like: Tensor, p: float) -> Tensor:
    """Return what the `drawn`-th dropout of a pass multiplies by, as autograd's way through the network has it."""
    shape = like.shape[1:]
    keep: Tensor = vmap(lambda key: dropout_mask(key, drawn, shape, p, streams.first))(streams.keys)
    return keep.to(like.dtype) / (1.0 - p)
