"""What peers learn from each other: distillers, feature statistics, and the one collective that carries them.

A step reads: ``say`` what the others need of this peer, ``start`` the exchange, prepare the next batch,
``wait`` for what the others said, take the losses. Nothing heard carries gradient, so a peer's backward pass
is its own.
"""

from metamixer_ray.distill.codistillation import StaleCopies, flat_state
from metamixer_ray.distill.config import DistillConfig, exchanges_statistics, kd_ramp, needs_validation, tells_weights
from metamixer_ray.distill.control import MAX_PEERS_IN_BF16, Control, ControlSum, PeersDisagree, PeersDrifted
from metamixer_ray.distill.distiller import (
    Distiller,
    build_distiller,
    distiller_names,
    learnt_by,
    takes_copies,
    takes_embedding,
)
from metamixer_ray.distill.exchange import EXCHANGE_DTYPES, Exchange, ExchangeCost, Pending
from metamixer_ray.distill.heard import Heard, Reduce
from metamixer_ray.distill.kdcl_general import ErrorProducts, GeneralTeacher, least_error_shares
from metamixer_ray.distill.layout import Layout, mean_over_places, read_layout
from metamixer_ray.distill.own import Own
from metamixer_ray.distill.statistics import (
    attention_agreement,
    attention_map,
    feature_statistics,
    similarity_matrix,
    statistics_loss,
    statistics_message,
)

__all__ = [
    "EXCHANGE_DTYPES",
    "MAX_PEERS_IN_BF16",
    "Control",
    "ControlSum",
    "DistillConfig",
    "Distiller",
    "ErrorProducts",
    "Exchange",
    "ExchangeCost",
    "GeneralTeacher",
    "Heard",
    "Layout",
    "Own",
    "PeersDisagree",
    "PeersDrifted",
    "Pending",
    "Reduce",
    "StaleCopies",
    "attention_agreement",
    "attention_map",
    "build_distiller",
    "distiller_names",
    "exchanges_statistics",
    "feature_statistics",
    "flat_state",
    "kd_ramp",
    "learnt_by",
    "least_error_shares",
    "mean_over_places",
    "needs_validation",
    "read_layout",
    "similarity_matrix",
    "statistics_loss",
    "statistics_message",
    "takes_copies",
    "takes_embedding",
    "tells_weights",
]
