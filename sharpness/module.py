"""Measures of anybody's modules, without a study: `flatmin.sharpness.measure`."""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, get_args

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from flatmin.errors import RequestError, nearest
from flatmin.sharpness.engine import Engine
from flatmin.sharpness.guards import generators_kept
from flatmin.sharpness.losses import check_mean, per_example
from flatmin.sharpness.measuring import Measured, measure_all
from flatmin.stack import Batch, StackedNetwork, stream_key

Loss = str | Callable[[Tensor, Tensor], Tensor]
Vectorize = Literal["auto", "vmap", "loop"]
Data = tuple[Tensor, Tensor] | Iterable[Sequence[Tensor]]
"""Inputs and targets, or batches of them (a DataLoader)."""

SETS = ("val", "test")
"""The names that `data=` can give beside `train`, which is the examples themselves."""


def measure(
    model: nn.Module,
    loss: Loss,
    data: Data,
    measures: Sequence[str],
    *,
    initial: nn.Module | Mapping[str, Tensor] | None = None,
    sets: Mapping[str, Data] | None = None,
    seed: int = 0,
    memory: int = 2**31,
    vectorize: Vectorize = "auto",
) -> pd.DataFrame:
    """Measure one model.

    The model is measured in eval mode, whatever its mode is. Its weights are the parameters that require gradients, or
    all of them where none does (`requires_grad_(False)` after loading); frozen ones are a fixed part of the network,
    which nothing displaces or counts, as buffers are. The model is left bit for bit as it was, and so are the
    generators of torch, numpy and Python. The data are read once and kept on the model's device.

    Args:
        model: The model, trained.
        loss: `cross_entropy`, `squared_error`, a torch loss with reduction 'mean' or 'none', or any differentiable
            function of (outputs, targets) that is a mean over examples or gives one number for each.
        data: The training examples, without augmentation: `(x, y)`, a DataLoader, or batches `(x, y)`.
        measures: Measures as in a study, `["lpf", "lambda_max(metric=identity)", "lpf(subset=2000)"]`.
        initial: The weights that training started from, as a module or its `state_dict`; some measures need them.
        sets: Other examples by name (`val`, `test`), for measures with `data=test`.
        seed: Of the random vectors; the same as that of a study's model gives the same ones.
        memory: Bytes that kept graphs and Krylov bases may take, each.
        vectorize: How several evaluations go through the network at once; `loop` for one that `torch.func.vmap`
            cannot take.

    Returns:
        One row per measure with the columns measure, label, value, stderr, samples, passes, converged, metric,
        seconds and settings; see docs/tables.md.

    Raises:
        RequestError: There is no such measure or loss, the examples are none, or the network or the loss cannot be
            measured; the message says why.
        FlatminError: A measure failed.

    >>> model = nn.Linear(2, 2)
    >>> x, y = torch.randn(100, 2), torch.randint(2, (100,))
    >>> frame = measure(model, "cross_entropy", (x, y), ["lambda_max", "lpf(sigma=0.1, metric=identity)"])
    >>> list(frame["label"]), bool(frame["converged"].all())
    (['lambda_max', 'lpf(metric=identity, sigma=0.1)'], True)
    """
    found = _measured(model, loss, data, measures, initial, sets, seed, memory, vectorize)
    return pd.DataFrame([row for (row,) in found.rows])


def curves(
    model: nn.Module,
    loss: Loss,
    data: Data,
    measures: Sequence[str],
    *,
    initial: nn.Module | Mapping[str, Tensor] | None = None,
    sets: Mapping[str, Data] | None = None,
    seed: int = 0,
    memory: int = 2**31,
    vectorize: Vectorize = "auto",
) -> pd.DataFrame:
    """Return the curves that measures of one model find beside their values; arguments and errors as `measure` has.

    Returns:
        One row per point with the columns kind, settings (JSON), x, y and value.
    """
    found = _measured(model, loss, data, measures, initial, sets, seed, memory, vectorize)
    points = [point for (of_model,) in found.points for point in of_model]
    return pd.DataFrame(points, columns=["kind", "settings", "x", "y", "value"])


def surface_between(
    first: nn.Module,
    second: nn.Module,
    loss: Loss,
    data: Data,
    *,
    points: int = 21,
    reach: float = 0.5,
    memory: int = 2**31,
    vectorize: Vectorize = "auto",
) -> pd.DataFrame:
    """Return the loss along the straight line between two models of one network, at (1 - x) first + x second.

    A bump between 0 and 1 is the barrier between two minima (Frankle et al. 2020). BatchNorm's running statistics go
    from one model's to the other's in the same way, and stay at the nearer model's beyond both. Models and data are
    left as they were; `loss` and `data` are as `measure` takes them.

    Args:
        first: The model at x = 0.
        second: The model at x = 1.
        loss: As for `measure`.
        data: As for `measure`.
        points: How many losses, evenly spread.
        reach: How far to go on beyond both models, in their distance.
        memory: Bytes that the weights of the models under way may take.
        vectorize: As for `measure`.

    Returns:
        One row per point with the columns kind (`surface`), settings (JSON), x, y (null) and value (the loss), as in
        the table `spectra/`.

    Raises:
        RequestError: The two are not of one network, the examples or points are none, or the network or the loss cannot
            be measured; the message says why.
    """
    if points < 2 or not 0 <= reach < math.inf:
        raise RequestError(f"points = {points}, reach = {reach:g}: should be 2 points or more, and 0 or more")
    first, device = _trained(first), _device(first, memory, vectorize)
    with _undisturbed(device):
        network = StackedNetwork(first, vectorize)
        start, near = StackedNetwork.stack([first])
        end, far = _flat(second, network, "second").to(device)[None], _buffers(second, near, device)
        batches = _batches(data, device)
        x, values = torch.linspace(-reach, 1.0 + reach, points, dtype=torch.float64, device=device), []
        for part in torch.split(x, max(1, memory // (start.element_size() * network.n_params))):
            inside = part.clamp(0.0, 1.0)
            engine = Engine(
                network,
                _between(start, end, part),
                {name: _between(buffer, far[name], inside) for name, buffer in near.items()},
                [Batch(batch.x, batch.y.expand(len(part), *batch.y.shape[1:]), shared=True) for batch in batches],
                torch.zeros(len(part), dtype=torch.int64, device=device),
                loss=per_example(loss),
                memory=memory,
            )
            _check_loss(engine, loss)
            values.append(engine.losses())
    settings = json.dumps({"directions": "between", "label": "between", "reach": reach}, sort_keys=True)
    found = {"kind": "surface", "settings": settings, "x": x.tolist(), "y": None, "value": torch.cat(values).tolist()}
    return pd.DataFrame(found)


def _between(near: Tensor, far: Tensor, x: Tensor) -> Tensor:
    """Return tensors `[P, ...]` at x `[P]` on the line from `near` to `far`, each `[1, ...]`."""
    if not near.is_floating_point():
        return near.expand(len(x), *near.shape[1:])
    along = x.reshape(-1, *[1] * (near.dim() - 1))
    return (near.double() * (1.0 - along) + far.double() * along).to(near.dtype)


def _buffers(model: nn.Module, like: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return what a model has under the names of stacked buffers `[1, ...]`, stacked.

    Raises:
        RequestError: It has something else, or nothing.
    """
    own, result = {**dict(model.named_parameters()), **dict(model.named_buffers())}, {}
    for name, buffer in like.items():
        if name not in own or own[name].shape != buffer.shape[1:]:
            raise RequestError(f"second: the buffer '{name}' is missing, or is not of the first model's shape")
        result[name] = own[name].detach().to(device)[None]
    return result


def _measured(
    model: nn.Module,
    loss: Loss,
    data: Data,
    measures: Sequence[str],
    initial: nn.Module | Mapping[str, Tensor] | None,
    sets: Mapping[str, Data] | None,
    seed: int,
    memory: int,
    vectorize: Vectorize,
) -> Measured:
    _check_labels(measures)
    for name in sets or {}:
        if name not in SETS:
            raise RequestError(f"sets has '{name}', which no measure can ask for.{nearest(name, SETS)}")
    model, device = _trained(model), _device(model, memory, vectorize)
    with _undisturbed(device):
        network = StackedNetwork(model, vectorize)
        params, buffers = StackedNetwork.stack([model])
        engine = Engine(
            network,
            params,
            buffers,
            _batches(data, device),
            torch.tensor([stream_key("measure", seed)], device=device),
            initial=None if initial is None else _flat(initial, network).to(device)[None],
            loss=per_example(loss),
            sets={name: _batches(own, device) for name, own in (sets or {}).items()},
            memory=memory,
        )
        _check_loss(engine, loss)
        return measure_all(engine, measures)


def _check_labels(measures: Sequence[str]) -> None:
    """Refuse what is no list of labels.

    Raises:
        RequestError: It is not.
    """
    if isinstance(measures, str):
        raise RequestError(f"measures is a list of labels; write [{measures!r}]")
    if not isinstance(measures, Iterable) or not all(isinstance(label, str) for label in measures):
        raise RequestError(f"measures = {measures!r}: should be a list of labels, such as ['lpf', 'lambda_max']")


def _trained(model: nn.Module) -> nn.Module:
    """Return a model whose weights, those that require gradients, are all its parameters where none does.

    Raises:
        RequestError: It has none, or they have no values.
    """
    parameters = list(model.parameters())
    if not parameters:
        raise RequestError("the network has no parameters, so there is no minimum to measure")
    if any(tensor.is_meta for tensor in (*parameters, *model.buffers())):
        raise RequestError("the network is on the device 'meta', which holds no numbers; load its weights first")
    if any(parameter.requires_grad for parameter in parameters):
        return model
    own = copy.deepcopy(model)
    for parameter in own.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return own


def _device(model: nn.Module, memory: int, vectorize: str) -> torch.device:
    """Return where a model is measured.

    Raises:
        RequestError: What it is to be measured with is wrong.
    """
    if not isinstance(memory, int) or memory < 0:
        raise RequestError(f"memory = {memory!r}: should be a number of bytes, 0 or more")
    if vectorize not in get_args(Vectorize):
        raise RequestError(f"vectorize = {vectorize!r}; valid: {', '.join(get_args(Vectorize))}")
    return next(model.parameters()).device


def _check_loss(engine: Engine, loss: Loss) -> None:
    """Refuse a loss that is no mean over examples; a named one is.

    Raises:
        RequestError: It is not.
    """
    if not isinstance(loss, str):
        one = torch.zeros(1, dtype=torch.int64, device=engine.device)
        some, buffers = engine.batches[0].select(one), {name: buffer[:1] for name, buffer in engine.buffers.items()}
        outputs = engine.network.logits(engine.params[:1], buffers, some).detach()[0]
        check_mean(loss, engine.loss, outputs, some.y[0])


def _batches(data: Data, device: torch.device) -> list[Batch]:
    """Return examples as batches of one model.

    Raises:
        RequestError: There are none, or they are something else.
    """
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        raise RequestError("data: a Dataset gives single examples and no batches; wrap it in a DataLoader")
    if not isinstance(data, Iterable):
        raise RequestError(f"data is (x, y), or batches of such, as tensors; it is {type(data).__name__}")
    pairs = [data] if isinstance(data, tuple) and all(isinstance(part, Tensor) for part in data) else list(data)
    batches = []
    for pair in pairs:
        if not (isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(part, Tensor) for part in pair)):
            raise RequestError(
                f"data is (x, y), or batches of such, as tensors; one of them is {type(pair).__name__}: wrap a Dataset "
                "in a DataLoader"
            )
        x, y = (part.detach() for part in pair)
        if x.dim() == 0 or y.dim() == 0 or len(x) != len(y):
            raise RequestError(f"data: inputs {list(x.shape)} and targets {list(y.shape)} differ in length")
        if x.is_meta or y.is_meta:
            raise RequestError("data: the examples are on the device 'meta', which holds no numbers")
        if len(x):
            batches.append(Batch(x.to(device), y.to(device)[None], shared=True))
    if not batches:
        raise RequestError("data: there are no examples to measure on")
    return batches


def _flat(given: nn.Module | Mapping[str, Tensor], network: StackedNetwork, what: str = "initial") -> Tensor:
    """Return weights as `[d]`; `what` is their name in messages.

    Raises:
        RequestError: They are not of this network.
    """
    named = dict(given.named_parameters()) if isinstance(given, nn.Module) else given
    for name, shape in zip(network.names, network.shapes, strict=True):
        if name not in named or tuple(named[name].shape) != shape:
            got = f"has the shape {list(named[name].shape)}" if name in named else "is missing"
            raise RequestError(f"{what}: the parameter '{name}' {got}; the model's has {list(shape)}")
    return torch.cat([named[name].detach().reshape(-1) for name in network.names])


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Give a context with gradients and without autocasting, after which all generators are as they were."""
    python, of_numpy = random.getstate(), np.random.get_state()
    with (
        generators_kept(device),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
    ):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(of_numpy)
