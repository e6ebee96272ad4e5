"""ScaLearn: learned scales over finished adapters (Frohmann et al., Findings of ACL 2024, arXiv 2310.01217)."""

from peft_dynamic.tuners.scalearn.config import ScaLearnConfig
from peft_dynamic.tuners.scalearn.model import ScaLearnModel

__all__ = ["ScaLearnConfig", "ScaLearnModel"]
