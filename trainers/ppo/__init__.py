"""Proximal policy optimization of a language model with reward functions, with any PEFT adapter or none."""

from peft_dynamic.trainers.ppo.config import PPOConfig
from peft_dynamic.trainers.ppo.trainer import PPOTrainer

__all__ = ["PPOConfig", "PPOTrainer"]
