"""Fewer active neurons: a loss on their density, a cut, their measurement, and decoding that skips inactive ones."""

from peft_dynamic.density.cut import ActivationCut, calibrate_cut, cut_activations
from peft_dynamic.density.loss import ActivationDensityLoss
from peft_dynamic.density.measure import measure_density
from peft_dynamic.density.report import DensityReport, DensityRow
from peft_dynamic.density.sparse import SparseInference, SparseLayer, sparse_inference

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
