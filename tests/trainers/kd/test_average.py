"""What a training leaves with average_from is the mean of its last weights; of an adapter, of its products."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BertForSequenceClassification, TrainerCallback

from peft_dynamic import DyLoRAConfig, MoSLoRAConfig
from peft_dynamic.trainers import KDConfig
from peft_dynamic.trainers.kd.average import Average
from tests.trainers.kd.common import assert_same, batch, classifier, trainer, weights

TARGETS: dict[str, Any] = {"target_modules": ["query", "word_embeddings"], "task_type": "SEQ_CLS"}
LORA = {**TARGETS, "r": 2, "lora_alpha": 8, "init_lora_weights": False}
QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query."
WORDS = "base_model.model.bert.embeddings.word_embeddings."


class Seen(TrainerCallback):
    """The weights after each step."""

    def __init__(self) -> None:
        self.after: list[dict[str, torch.Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.after.append(weights(model))


def adapted(config: Any = None) -> Any:
    torch.manual_seed(3)
    return get_peft_model(classifier(0, dropout=0.5), LoraConfig(**LORA) if config is None else config)


def best(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def products(state: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """B A of the query, and of the embedding."""
    return [
        state[f"{QUERY}lora_B.default.weight"].double() @ state[f"{QUERY}lora_A.default.weight"].double(),
        state[f"{WORDS}lora_embedding_B.default"].double() @ state[f"{WORDS}lora_embedding_A.default"].double(),
    ]


def test_all_weights(tmp_path: Path) -> None:
    seen = Seen()
    made = trainer(tmp_path, classifier(1, 2), average_from=0.5, max_steps=8, callbacks=[seen])
    for _ in range(2):  # the second training begins anew
        seen.after.clear()
        made.train()
        last = seen.after[3:]  # after the steps 4 to 8
        assert len(last) == 5
        assert made.average is not None
        assert made.average.count == 5
        for name, value in weights(made.model).items():
            wanted = torch.stack([each[name].double() for each in last]).mean(0)
            torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=1e-6)
    made.save_model(str(tmp_path / "saved"))
    assert_same(weights(BertForSequenceClassification.from_pretrained(tmp_path / "saved")), weights(made.model))


@pytest.mark.parametrize("kind", [LoraConfig, DyLoRAConfig])
@pytest.mark.parametrize("start", [0.0, 0.7])  # more factors than fit into the matrix, and fewer
def test_the_products_of_an_adapter(kind: Any, start: float, tmp_path: Path) -> None:
    seen = Seen()
    more = {"rank_sampling": "uniform"} if kind is DyLoRAConfig else {}
    model = adapted(kind(**LORA, **more))
    settings = {
        "average_from": start,
        "max_steps": 8,
        "learning_rate": 0.1,
        "callbacks": [seen],
        "lr_scheduler_type": "constant",
    }
    made = trainer(tmp_path, "base", model, **settings)
    made.train()
    last = seen.after[5:] if start else seen.after
    query = f"{QUERY}lora_B.default.weight", f"{QUERY}lora_A.default.weight"
    factors = [torch.stack([each[name].double() for each in last]).mean(0) for name in query]
    found = products(weights(model))[0]
    assert (factors[0] @ factors[1] - found).norm() > 1e-3 * found.norm()  # the mean of the factors is another thing
    rows = zip(products(weights(model)), *(products(each) for each in last), strict=True)
    for found, *each in rows:
        mean = torch.stack(each).mean(0)
        wanted = best(mean, 2)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    head = "base_model.model.classifier.modules_to_save.default.weight"
    torch.testing.assert_close(weights(model)[head], torch.stack([each[head] for each in last]).mean(0))
    if kind is LoraConfig:
        made.save_model(str(tmp_path / "saved"))
        again = PeftModel.from_pretrained(classifier(0, dropout=0.5), tmp_path / "saved").eval()
        bare = {**batch(), "labels": None}
        torch.testing.assert_close(again(**bare).logits, model.eval()(**bare).logits)


@pytest.mark.parametrize("kind", ["weights", "adapter"])
@pytest.mark.parametrize("start", [0.2, 0.7])  # the mean has begun at the checkpoint, or not
def test_a_resumed_run_is_the_uninterrupted_one(kind: str, start: float, tmp_path: Path) -> None:
    def made(folder: str, **more: Any) -> Any:
        model = adapted() if kind == "adapter" else classifier(0, dropout=0.5)
        return trainer(tmp_path / folder, classifier(1, 2), model, average_from=start, max_steps=6, **more)

    whole = made("whole", save_strategy="steps", save_steps=3)
    whole.train()
    again = made("again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert_same(weights(again.model), weights(whole.model))
    plain = trainer(tmp_path / "plain", classifier(1, 2), again.model, max_steps=6, save_strategy="steps", save_steps=3)
    if start == 0.2:
        plain.train()
        with pytest.raises(ValueError, match="trained without average_from"):
            made("third").train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-3"))


def test_one_fixed_factor_needs_no_approximation() -> None:
    model = adapted()
    for name, p in model.named_parameters():
        if "lora_A" in name:
            p.requires_grad_(False)
    average, seen = Average(model), []
    for _ in range(3):
        with torch.no_grad():
            model.get_parameter(f"{QUERY}lora_B.default.weight").add_(torch.randn(16, 2))
        average.add()
        seen.append(products(weights(model))[0])
    average.put()
    torch.testing.assert_close(products(weights(model))[0], torch.stack(seen).mean(0))


def test_refusals(tmp_path: Path) -> None:
    for value in (1.0, -0.1, "half", float("nan")):
        with pytest.raises(ValueError, match=r"average_from=.*must be a number from 0"):
            KDConfig(average_from=value)
    with pytest.raises(ValueError, match="Leave one out"):
        KDConfig(average_from=0.5, load_best_model_at_end=True, eval_strategy="steps", save_strategy="steps")
    for config in (LoraConfig(**LORA, use_dora=True), MoSLoRAConfig(**{**LORA, "target_modules": ["query"]})):
        with pytest.raises(ValueError, match="is no product of two matrices"):
            trainer(tmp_path, "base", adapted(config), average_from=0.5)
