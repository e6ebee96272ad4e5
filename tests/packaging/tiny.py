"""Models small enough to stand for a reader's own."""

from pathlib import Path
from typing import Any

import torch


def llama(layers: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2}  # 64: the block of 4-bit kernels
    ends = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=330, num_hidden_layers=layers, **sizes, **ends)).eval()
    model.generation_config.eos_token_id = [*range(1, 330, 4)]  # its texts end, as those of a trained model do
    return model


def bert() -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(vocab_size=330, num_labels=2, **sizes)).eval()


def adapter(folder: Path, base: str = "my/model", **settings: Any) -> None:
    """A LoRA of rank 32 that has learned something, or what `settings` say, in a folder."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = settings.pop("config", LoraConfig)
    given = {"r": 32, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config(**given | settings)).save_pretrained(folder)


def distilling() -> dict[str, Any]:
    """A student, its rows, and the folders of its teacher and of language models to distil."""
    from datasets import Dataset

    from tests.trainers.citation.common import tokenizer

    bert().save_pretrained("teacher-dir")
    for name, layers in {"small-model": 1, "big-model": 2}.items():
        llama(layers).save_pretrained(name)
        tokenizer(chat=True, end=True).save_pretrained(name)
    rows = [{"input_ids": [5, 6, 7 + i], "attention_mask": [1, 1, 1], "labels": i % 2} for i in range(4)]
    batch = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
    return {"student": bert(), "labelled_rows": Dataset.from_list(rows), "labelled_batch": batch}
