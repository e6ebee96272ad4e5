"""Fewer active neurons: a loss on the density of the feed-forward activations, and its measurement."""

from .loss import ActivationDensityLoss
from .measure import measure_density
from .report import DensityReport, DensityRow

__all__ = ["ActivationDensityLoss", "DensityReport", "DensityRow", "measure_density"]
