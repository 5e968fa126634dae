"""Routers: pure functions from logits to a routing, one file per family, chosen by name."""

from moe.routers.base import Router
from moe.routers.dense import Dense
from moe.routers.dselect_k import DSelectK
from moe.routers.expert_choice import ExpertChoice
from moe.routers.relu import ReLU
from moe.routers.sigmoid import Sigmoid
from moe.routers.sinkhorn import Sinkhorn
from moe.routers.soft import Soft
from moe.routers.softmax import Softmax
from moe.routers.sparse_topk import SparseTopK
from moe.routers.sparse_transport import SparseTransport
from moe.routers.successive_halving import SuccessiveHalving
from moe.routers.unlearned import Hash, Random

ROUTERS: dict[str, type[Router]] = {
    "softmax": Softmax,
    "sparse_topk": SparseTopK,
    "successive_halving": SuccessiveHalving,
    "sigmoid": Sigmoid,
    "relu": ReLU,
    "sinkhorn": Sinkhorn,
    "sparse_transport": SparseTransport,
    "dselect_k": DSelectK,
    "expert_choice": ExpertChoice,
    "soft": Soft,
    "hash": Hash,
    "random": Random,
    "dense": Dense,
}

__all__ = [
    "ROUTERS",
    "DSelectK",
    "Dense",
    "ExpertChoice",
    "Hash",
    "Random",
    "ReLU",
    "Router",
    "Sigmoid",
    "Sinkhorn",
    "Soft",
    "Softmax",
    "SparseTopK",
    "SparseTransport",
    "SuccessiveHalving",
]
