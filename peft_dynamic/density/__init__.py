"""Fewer active neurons: a loss on their density, a cut, their measurement, and decoding that skips inactive ones."""

from .cut import ActivationCut, calibrate_cut, cut_activations
from .loss import ActivationDensityLoss
from .measure import measure_density
from .report import DensityReport, DensityRow
from .sparse import SparseInference, SparseLayer, sparse_inference

__all__ = [
    "ActivationCut",
    "ActivationDensityLoss",
    "DensityReport",
    "DensityRow",
    "SparseInference",
    "SparseLayer",
    "calibrate_cut",
    "cut_activations",
    "measure_density",
    "sparse_inference",
]
