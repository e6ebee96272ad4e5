"""Models small enough to stand for a reader's own."""

from pathlib import Path
from typing import Any


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
