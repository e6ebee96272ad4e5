"""What the tests of SoFTTrainer share: a tokenizer of whole words, a trainer at toy size, and the plain reference."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from peft_dynamic.trainers import SoFTConfig, SoFTTrainer
from tests.trainers.soft.families import VOCABULARY, build, cut, layers_of

CHAT = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + ' w1 ' }}"
    "{% endgeneration %}{% else %}{{ 'w2 ' + m['content'] + ' ' }}{% endif %}{% endfor %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="w0", eos_token="w1", unk_token="w3", chat_template=CHAT
    )


def words(count: int, seed: int) -> str:
    ids = torch.randint(4, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))
    return " ".join(f"w{i}" for i in ids.tolist())


def rows(count: int = 8) -> list[dict[str, Any]]:
    """Prompts and completions of different lengths."""
    return [{"prompt": words(2 + i % 3, i) + " ", "completion": words(3 + i % 4, 100 + i)} for i in range(count)]


# Of every trainer on SFTTrainer in these tests: on the CPU, and without files, bars and services.
TOY: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


def trainer(folder: Path, model: Any = None, data: Any = None, eval_data: Any = None, **more: Any) -> SoFTTrainer:
    """On a Llama of six layers, with its exits 2, 4 and 6, unless told otherwise."""
    others = {key: more.pop(key) for key in ("peft_config", "callbacks", "data_collator") if key in more}
    config = {**TOY, "exits": [2, 4, 6], "max_steps": 2, **more}
    return SoFTTrainer(
        build("llama") if model is None else model,
        SoFTConfig(str(folder), **config),
        train_dataset=Dataset.from_list(rows() if data is None else data),
        eval_dataset=None if eval_data is None else Dataset.from_list(eval_data),
        processing_class=tokenizer(),
        **others,
    )


def first_batch(made: SoFTTrainer) -> dict[str, Any]:
    return dict(next(iter(made.get_train_dataloader())))


def assert_trained_as_sft(made: Any, keys: tuple[str, ...]) -> None:
    """A trainer that has taken three steps on `rows()` has logged and trained what stock SFTTrainer does."""
    config = SFTConfig(made.args.output_dir, **TOY, max_steps=3, max_length=64)
    stock = SFTTrainer(build("llama"), config, train_dataset=Dataset.from_list(rows()), processing_class=tokenizer())
    stock.train()
    for key in keys:
        values = [[log[key] for log in each.state.log_history if key in log] for each in (made, stock)]
        assert len(values[0]) == 3
        assert values[0] == pytest.approx(values[1], rel=1e-5), key
    for (name, p), (_, other) in zip(made.model.named_parameters(), stock.model.named_parameters(), strict=True):
        torch.testing.assert_close(p, other, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def plain_losses(model: Any, batch: dict[str, Any], exits: list[int]) -> torch.Tensor:
    """(E,) mean losses by stock transformers, of the same parameters with the layers after each exit taken out."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = layers_of(base)
    every, depth = list(layers), base.config.num_hidden_layers
    labels = batch["labels"]
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "use_cache")}
    found = []
    for k in exits:
        try:
            cut(base, k) if getattr(base.config, "layer_types", None) is None else layers.__delitem__(slice(k, None))
            base.config.num_hidden_layers = k
            logits = model(**inputs, use_cache=False).logits
        finally:
            del layers[:]
            layers.extend(every)
            base.config.num_hidden_layers = depth
        logits = logits[:, -labels.shape[1] :]  # without virtual tokens
        found.append(nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))
    return torch.stack(found)


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def assert_losses_and_gradients(made: SoFTTrainer, exits: list[int], batch: dict[str, Any] | None = None) -> None:
    """The trainer's loss is the mean of the plain ones, and so are the gradients of all that is trained."""
    batch = first_batch(made) if batch is None else batch
    model = made.model.eval()  # no dropout
    wanted = plain_losses(model, copy.copy(batch), exits).mean()
    parameters = trained(model)
    others = torch.autograd.grad(wanted, list(parameters.values()), allow_unused=True)
    loss = made.compute_loss(model, dict(batch))
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
    mine = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    for name, one, two in zip(parameters, mine, others, strict=True):
        zero = torch.zeros_like(parameters[name])
        one, two = (zero if g is None else g for g in (one, two))
        torch.testing.assert_close(one, two, rtol=2e-4, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")
    assert any(g is not None and g.abs().max() > 1e-4 for g in mine)
