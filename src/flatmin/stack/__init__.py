"""The stack: K models of one network as one [K, d] buffer, their losses, gradients and noise."""

from flatmin.stack.network import Batch, StackedNetwork
from flatmin.stack.streams import Streams, normal, permutation, rademacher, stream_key, uniform

__all__ = [
    "Batch",
    "StackedNetwork",
    "Streams",
    "normal",
    "permutation",
    "rademacher",
    "stream_key",
    "uniform",
]
