"""What the tests of distillation share: tiny students and teachers of each task, rows, and a trainer at toy size."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    default_data_collator,
)

from peft_dynamic.trainers import KDConfig, KDTrainer

WORDS = 50
BERT = {"vocab_size": WORDS, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
LLAMA = {"vocab_size": WORDS, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}


def classifier(seed: int = 0, layers: int = 1, classes: int = 3, dropout: float = 0.0, **more: Any) -> Any:
    torch.manual_seed(seed)
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    config = BertConfig(**{**BERT, "num_hidden_layers": layers, "num_labels": classes, **rates, **more})
    return _large(BertForSequenceClassification(config))


def tagger(seed: int = 0, layers: int = 1) -> Any:
    torch.manual_seed(seed)
    return _large(BertForTokenClassification(BertConfig(**BERT, num_hidden_layers=layers, num_labels=3)))


def masked(seed: int = 0, layers: int = 1) -> Any:
    torch.manual_seed(seed)
    return _large(BertForMaskedLM(BertConfig(**BERT, num_hidden_layers=layers)))


def causal(seed: int = 0, layers: int = 1, **more: Any) -> Any:
    torch.manual_seed(seed)
    ends = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    return _large(LlamaForCausalLM(LlamaConfig(**{**LLAMA, **ends, "num_hidden_layers": layers, **more})))


def seq2seq(seed: int = 0, layers: int = 1) -> Any:
    torch.manual_seed(seed)
    sizes = {"vocab_size": WORDS, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "decoder_start_token_id": 0}
    return _large(T5ForConditionalGeneration(T5Config(**sizes, num_layers=layers)))


def _large(model: Any) -> Any:
    """Weights large enough for a teacher to differ from its student."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0 if module.p != 0.5 else 0.5
    return model.eval()


MODELS = {"sequence": classifier, "tokens": tagger, "masked": masked, "causal": causal, "seq2seq": seq2seq}


def rows(task: str = "sequence", count: int = 16, length: int = 6) -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(5)

    def ids(high: int, *shape: int) -> Any:
        return torch.randint(2, high, shape, generator=draw).tolist()

    found = []
    for _ in range(count):
        row: dict[str, Any] = {"input_ids": ids(WORDS, length), "attention_mask": [1] * length}
        if task == "sequence":
            row["labels"] = int(ids(5, 1)[0]) - 2
        elif task == "tokens":
            row["labels"] = [-100, *(i - 2 for i in ids(5, length - 1))]
        else:
            row["labels"] = [-100, -100, *ids(WORDS, length - 2)]
        found.append(row)
    return found


def batch(task: str = "sequence", count: int = 4) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([row[name] for row in rows(task, count)]) for name in rows(task, 1)[0]}


SETTINGS: dict[str, Any] = {
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


def trainer(folder: Path, teacher: Any = None, model: Any = None, task: str = "sequence", **more: Any) -> KDTrainer:
    names = ("peft_config", "teacher_quantization", "train_dataset", "eval_dataset", "callbacks", "processing_class")
    others = {name: more.pop(name) for name in names if name in more}
    config = more.pop("config", None) or KDConfig(str(folder), **{**SETTINGS, **more})
    data = {"train_dataset": Dataset.from_list(rows(task)), **others}
    model = MODELS[task](0) if model is None else model
    return KDTrainer(model, teacher, config, data_collator=default_data_collator, **data)


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.state_dict().items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name
