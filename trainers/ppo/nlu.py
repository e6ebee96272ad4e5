"""Moved to `peft_dynamic.trainers.rewards.nlu`; the names of before are still here."""

from peft_dynamic.trainers.rewards.nlu import Message, RewardFunction, nlu_parse, nlu_prompt, nlu_reward, nlu_target

__all__ = ["Message", "RewardFunction", "nlu_parse", "nlu_prompt", "nlu_reward", "nlu_target"]
