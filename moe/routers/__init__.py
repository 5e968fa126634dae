"""Routers: pure functions from logits to a routing, one file per family, chosen by name."""

from moe.routers.base import Router
from moe.routers.sigmoid import Sigmoid
from moe.routers.softmax import Softmax
from moe.routers.sparse_topk import SparseTopK
from moe.routers.successive_halving import SuccessiveHalving

ROUTERS: dict[str, type[Router]] = {
    "softmax": Softmax,
    "sparse_topk": SparseTopK,
    "successive_halving": SuccessiveHalving,
    "sigmoid": Sigmoid,
}

__all__ = ["ROUTERS", "Router", "Sigmoid", "Softmax", "SparseTopK", "SuccessiveHalving"]
