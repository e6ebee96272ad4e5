"""Facts about transformers and TRL that we rely on: a release that breaks one turns a test red by name."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import Trainer, TrainingArguments

from peft_dynamic.density.trainer_step import MULTIPLIED
from peft_dynamic.hosts.blocks import base_model, find_norms, is_encoder, linear_features, original_modules
from peft_dynamic.hosts.decoder import check_decoder, find_decoder
from peft_dynamic.hosts.probe import alike, trial
from tests.tuners.common import rows, tiny_llama


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(1, 1)

    def forward(self, x: torch.Tensor, labels: Any = None) -> dict[str, torch.Tensor]:
        y = self.line(x)
        return {"loss": (y - labels).square().mean(), "logits": y}


def test_a_step_of_trainer_hands_its_loss_to_accelerator_backward(tmp_path: Path) -> None:
    data = Dataset.from_dict({"x": [[1.0]] * 4, "labels": [[2.0]] * 4}).with_format("torch")
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 1, "report_to": "none"}
    trainer = Trainer(Line(), TrainingArguments(str(tmp_path), use_cpu=True, **settings), train_dataset=data)
    handed: list[float] = []
    parts: list[int] = []
    backward = trainer.accelerator.backward

    def watched(loss: torch.Tensor, **options: Any) -> None:
        handed.append(float(loss.detach()))
        parts.append(trainer.current_gradient_accumulation_steps)
        backward(loss, **options)

    trainer.accelerator.backward = watched
    trainer.train()
    assert len(handed) == 2  # once a part
    assert parts == [2, 2]
    assert "backward" in inspect.getsource(Trainer.training_step)


def test_the_losses_that_a_step_does_not_divide_are_there() -> None:
    from transformers.loss.loss_utils import LOSS_MAPPING

    assert {*LOSS_MAPPING} >= MULTIPLIED


def test_a_decoder_is_its_layers_a_norm_and_a_head() -> None:
    model = tiny_llama().eval()
    decoder = find_decoder(model)
    check_decoder(decoder)
    ran, states, logits = trial(decoder)
    assert ran == [*range(decoder.depth)]
    assert decoder.depth == model.config.num_hidden_layers
    assert alike(decoder.logits(states[decoder.depth - 1]), logits)
    assert decoder.head is model.get_output_embeddings()


def test_the_blocks_of_a_model_are_found_by_structure() -> None:
    model = tiny_llama()
    assert base_model(model) is model
    assert not is_encoder(model)
    modules = dict(original_modules(model))
    assert linear_features(modules["model.layers.0.mlp.down_proj"])[1] == model.config.hidden_size
    assert len(find_norms(model)) == 2 * model.config.num_hidden_layers + 1
    assert model(input_ids=rows(1)).logits.dim() == 3


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}])
def test_generate_repeats_its_rows_in_one_place_and_says_how_often(settings: dict[str, Any]) -> None:
    model, told = tiny_llama().eval(), []
    expand = model._expand_inputs_for_generation

    def watched(*args: Any, expand_size: int = 1, **kwargs: Any) -> Any:
        told.append(expand_size)
        ids, more = expand(*args, expand_size=expand_size, **kwargs)
        assert torch.equal(ids, rows(2).repeat_interleave(expand_size, 0))
        return ids, more

    model._expand_inputs_for_generation = watched
    model.generate(input_ids=rows(2), max_new_tokens=2, **settings)
    assert told == [max([1, *settings.values()])]


def test_trl_keeps_its_metrics_by_mode_and_counts_its_tokens() -> None:
    from trl import SFTTrainer

    source = inspect.getsource(SFTTrainer)
    assert 'self._metrics = {"train":' in source
    assert "self._total_train_tokens" in source
