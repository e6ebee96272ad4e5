"""Model cards: what an adapter is, and how to load it with and without this package. Text alone; nothing is sent."""

from peft_dynamic.cards.facts import CardFacts, Twin
from peft_dynamic.cards.usage import AUTO_CLASSES, REPO_ID, base_repo, model_class_name
from peft_dynamic.cards.write import END, START, merge_readmes, write_model_card

__all__ = [
    "AUTO_CLASSES",
    "END",
    "REPO_ID",
    "START",
    "CardFacts",
    "Twin",
    "base_repo",
    "merge_readmes",
    "model_class_name",
    "write_model_card",
]
