"""Tiny models with a LoRETTA_adp adapter, and what the tests read off them."""

from collections.abc import Iterator
from typing import Any

import torch
import transformers
from peft import get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from peft_dynamic import LorettaAdpConfig
from peft_dynamic.tuners.loretta_adp import LorettaAdpLayer, TensorTrainLinear
from tests.tuners.common import rows, tiny_llama

SMALL: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES = SMALL | {"intermediate_size": 48}


def settings(**others: Any) -> LorettaAdpConfig:
    return LorettaAdpConfig(**({"bottleneck": 8, "tensor_rank": 2} | others))


def adapted(base: nn.Module | None = None, **others: Any) -> Any:
    base = tiny_llama() if base is None else base
    return get_peft_model(base, settings(**({"task_type": "CAUSAL_LM"} | others)))


def tiny_bert() -> nn.Module:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**SIZES)).eval()


def tiny_roberta() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.RobertaConfig(**SIZES)
    return transformers.RobertaForSequenceClassification(config).eval()


def logits(model: nn.Module, ids: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=rows(4) if ids is None else ids).logits


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def layers(model: nn.Module) -> dict[str, LorettaAdpLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LorettaAdpLayer)}


def trains(model: nn.Module) -> Iterator[TensorTrainLinear]:
    return (module for module in model.modules() if isinstance(module, TensorTrainLinear))


def matrix(train: TensorTrainLinear) -> torch.Tensor:
    """W, from left to right."""
    result, *others = train.core_list()
    for core in others:
        result = torch.tensordot(result, core, ([-1], [0]))
    return result.reshape(train.in_features, train.out_features)


def step(model: nn.Module, optimizer: torch.optim.Optimizer | None = None, ids: torch.Tensor | None = None) -> float:
    ids = rows(4) if ids is None else ids
    optimizer = optimizer or torch.optim.Adam(trainable(model).values(), lr=1e-2)
    model.train()
    labels = ids[:, 0] % 2 if "Classification" in type(model).__name__ else ids
    loss = model(input_ids=ids, labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def changed(model: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}
