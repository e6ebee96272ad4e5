"""Adapters on the Hugging Face Hub: one repository with the whole adapter, its plain-LoRA twins, and a card."""

from peft_dynamic.cards import AUTO_CLASSES, END, REPO_ID, START, model_class_name, write_model_card
from peft_dynamic.hub.card import write_card
from peft_dynamic.hub.push import push_adapter

__all__ = [
    "AUTO_CLASSES",
    "END",
    "REPO_ID",
    "START",
    "model_class_name",
    "push_adapter",
    "write_card",
    "write_model_card",
]
