"""Sharpness measures of trained models: a functional of the loss in a metric, one file each.

    from flatmin.sharpness import measure
    frame = measure(model, nn.CrossEntropyLoss(), loader, ["lpf", "lambda_max(metric=identity)"])

A measure is a function `measure(engine, *, metric="filter", ...) -> Estimate`: an `Engine` is K trained
models as functions of their weights, an `Estimate` is a value per model with its uncertainty and its cost.

    engine = Engine(network, params, buffers, batches, keys)
    rows = measure_stack(engine, ["lpf", "lambda_max(metric=identity)"])
"""

from flatmin.sharpness.engine import Engine
from flatmin.sharpness.estimate import Curve, Estimate
from flatmin.sharpness.measuring import Measured, measure_all, measure_stack, refused, row_without_value
from flatmin.sharpness.metric import Metric, scale
from flatmin.sharpness.module import curves, measure, surface_between

__all__ = [
    "Curve",
    "Engine",
    "Estimate",
    "Measured",
    "Metric",
    "curves",
    "measure",
    "measure_all",
    "measure_stack",
    "refused",
    "row_without_value",
    "scale",
    "surface_between",
]
