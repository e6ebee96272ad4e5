"""Proximal policy optimization of a language model with reward functions, with any PEFT adapter or none."""

from .config import PPOConfig
from .trainer import PPOTrainer

__all__ = ["PPOConfig", "PPOTrainer"]
