"""Moved to `peft_dynamic.exits.calibrate`; the names of before are still here."""

from peft_dynamic.exits.calibrate import Calibration, calibrate_thresholds

__all__ = ["Calibration", "calibrate_thresholds"]
