"""Fewer active neurons: a loss on their density, its measurement, and decoding that skips the inactive ones."""

from .loss import ActivationDensityLoss
from .measure import measure_density
from .report import DensityReport, DensityRow
from .sparse import SparseInference, SparseLayer, sparse_inference

__all__ = [
    "ActivationDensityLoss",
    "DensityReport",
    "DensityRow",
    "SparseInference",
    "SparseLayer",
    "measure_density",
    "sparse_inference",
]
