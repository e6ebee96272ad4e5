"""Fusion-in-Decoder: equal to T5 on one passage, passages encoded apart, and under Seq2SeqTrainer, PEFT and saving."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    BartForConditionalGeneration,
    MT5Config,
    MT5ForConditionalGeneration,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutput

from peft_dynamic import DyLoRAConfig
from peft_dynamic.trainers.citation.collators import FiDDataCollator
from peft_dynamic.trainers.citation.fid import FiDForConditionalGeneration

from .common import ROWS, tiny_t5, tokenizer

FAMILY = [
    (T5Config, T5ForConditionalGeneration),
    (MT5Config, MT5ForConditionalGeneration),
    (UMT5Config, UMT5ForConditionalGeneration),
]
WAYS = [{"num_beams": 3}, {"do_sample": True, "top_p": 0.95, "top_k": 40}, {"do_sample": True, "num_beams": 2}, {}]


def fid(**changes: Any) -> Any:
    torch.manual_seed(0)
    return FiDForConditionalGeneration.from_model(T5ForConditionalGeneration(tiny_t5(**changes))).eval()


def passages(count: int, rows: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    ids = torch.randint(2, 330, (rows, count, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, 0, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.randint(2, 330, (rows, 5), generator=generator)}


def by_hand(model: Any, batch: dict[str, torch.Tensor], row: int, real: list[int]) -> torch.Tensor:
    """Logits of one row with T5's parts: each passage encoded alone, without padding, then side by side."""
    ids, mask = batch["input_ids"][row], batch["attention_mask"][row]
    states = [model.encoder(input_ids=ids[i : i + 1, mask[i] == 1]).last_hidden_state for i in real]
    joined = BaseModelOutput(last_hidden_state=torch.cat(states, dim=1))
    return T5ForConditionalGeneration.forward(
        model, encoder_outputs=joined, labels=batch["labels"][row : row + 1]
    ).logits


@pytest.mark.parametrize(("config", "t5"), FAMILY)
def test_one_passage_is_t5_bit_for_bit(tmp_path: Path, config: type, t5: type) -> None:
    torch.manual_seed(0)
    plain = t5(tiny_t5(config)).eval()
    plain.save_pretrained(tmp_path)
    model = FiDForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert isinstance(model, t5)
    batch = passages(1)
    flat = {key: value[:, 0] if value.dim() == 3 else value for key, value in batch.items()}
    for mask in (True, False):
        drop = set() if mask else {"attention_mask"}
        ours, theirs = (
            net(**{k: v for k, v in given.items() if k not in drop}) for net, given in ((model, batch), (plain, flat))
        )
        assert torch.equal(ours.loss, theirs.loss)
        assert torch.equal(ours.logits, theirs.logits)
    del flat["labels"]
    for way in WAYS:
        made = []
        for net, given in ((model, batch), (plain, flat)):
            torch.manual_seed(1)
            made.append(net.generate(**given, max_new_tokens=8, **way))
        assert torch.equal(*made)
    # and of two dimensions it is the T5 itself
    assert torch.equal(model(**flat, labels=batch["labels"]).logits, theirs.logits) is False  # the last one had no mask
    assert torch.equal(model(**flat, labels=batch["labels"]).logits, plain(**flat, labels=batch["labels"]).logits)
    assert torch.equal(model.generate(**flat, max_new_tokens=8), plain.generate(**flat, max_new_tokens=8))


def test_passages_are_encoded_apart_and_absent_ones_do_not_count() -> None:
    model, batch = fid(), passages(3)
    batch["attention_mask"][1, 1] = 0  # the second row lacks its second passage
    logits = model(**batch).logits
    torch.testing.assert_close(logits[:1], by_hand(model, batch, 0, [0, 1, 2]))
    torch.testing.assert_close(logits[1:], by_hand(model, batch, 1, [0, 2]))
    changed = {key: value.clone() for key, value in batch.items()}
    changed["input_ids"][1, 1] = 5
    changed["input_ids"][1, 0, 4:] = 5
    assert torch.equal(model(**changed).logits, logits)
    changed["input_ids"][1, 2, 0] = 5
    assert not torch.allclose(model(**changed).logits[1], logits[1])
    # Generation sees the same: each row alone, without its absent passages, says what it says in the batch.
    for way in ({}, {"num_beams": 3}):
        together = model.generate(**batch, max_new_tokens=6, min_new_tokens=6, **way)
        for row, real in ((0, [0, 1, 2]), (1, [0, 2])):
            alone = {key: batch[key][row : row + 1, real] for key in ("input_ids", "attention_mask")}
            assert torch.equal(model.generate(**alone, max_new_tokens=6, min_new_tokens=6, **way)[0], together[row])


def test_order_of_passages_matters_only_through_their_text() -> None:
    model, batch = fid(), passages(3, rows=1)
    turned = {**batch, "input_ids": batch["input_ids"].flip(1), "attention_mask": batch["attention_mask"].flip(1)}
    torch.testing.assert_close(model(**turned).logits, model(**batch).logits)


def test_generate_ignores_labels() -> None:
    model, batch = fid(), passages(2)
    labels = batch.pop("labels")
    assert torch.equal(
        model.generate(**batch, labels=labels, max_new_tokens=6), model.generate(**batch, max_new_tokens=6)
    )


def gradients(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(3)
    model(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("per_pass", [1, 2, None])
@pytest.mark.parametrize("layers", [False, True])
def test_checkpointing_over_passages(per_pass: int | None, layers: bool) -> None:
    model, batch = fid(dropout_rate=0.0).train(), passages(3)
    wanted = gradients(model, batch)
    calls: list[int] = []
    handle = model.encoder.register_forward_pre_hook(
        lambda _, __, kwargs: calls.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    model.checkpoint_passages(per_pass)
    if layers:
        model.gradient_checkpointing_enable()
    found = gradients(model, batch)
    handle.remove()
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], msg=name)
    # each group once forward and once more in the backward pass
    assert sorted(calls) == {1: [1] * 12, 2: [2] * 6, None: [6]}[per_pass]
    model.eval()
    calls.clear()
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, fid(dropout_rate=0.0)(**batch).logits)


def test_checkpointing_repeats_dropout() -> None:
    model, batch = fid(dropout_rate=0.5).train(), passages(2, rows=1)
    model.checkpoint_passages(2)
    wanted = fid(dropout_rate=0.5).train()
    for ours, theirs in zip(gradients(model, batch).values(), gradients(wanted, batch).values(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_loss_by_num_items() -> None:
    model, batch = fid(), passages(2)
    batch["labels"][0, 3:] = -100
    parts = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(2)]
    summed = sum(model(**part, num_items_in_batch=torch.tensor(8)).loss for part in parts)
    torch.testing.assert_close(summed, model(**batch).loss)
    assert not torch.allclose(sum(model(**part).loss for part in parts) / 2, model(**batch).loss, rtol=1e-4)


@pytest.mark.parametrize(
    "config", [LoraConfig(r=4, target_modules="all-linear"), DyLoRAConfig(r=4, target_modules=["q", "v"])]
)
def test_adapters(tmp_path: Path, config: Any) -> None:
    batch = passages(3)
    config.task_type = "SEQ_2_SEQ_LM"
    model = get_peft_model(fid(), config)
    model.base_model.model.checkpoint_passages(1)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(6):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01
    encoder = [p for name, p in model.named_parameters() if "lora_B" in name and ".encoder." in name]
    assert all(p.abs().max() > 0 for p in encoder)
    model.eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fid(), tmp_path).eval()
    saved = model.state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in loaded.state_dict().items())
    with torch.no_grad():  # close, not equal: one reads the passages one by one, the other all at once
        torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits)
        assert torch.equal(loaded.generate(**batch, max_new_tokens=5), model.generate(**batch, max_new_tokens=5))


def test_prompt_learning_is_refused() -> None:
    from peft import PromptTuningConfig

    model = get_peft_model(fid(), PromptTuningConfig(num_virtual_tokens=2, task_type="SEQ_2_SEQ_LM"))
    with pytest.raises(RuntimeError, match="same number of dimensions"):  # PEFT's own, before ours is asked
        model(**passages(2))
    batch = passages(2)
    embeds = torch.zeros(*batch.pop("input_ids").shape, 32)
    with pytest.raises(ValueError, match="prompt learning"):
        fid()(**batch, inputs_embeds=embeds)


def test_saved_as_an_ordinary_t5(tmp_path: Path) -> None:
    model, batch = fid(), passages(2)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["T5ForConditionalGeneration"]
    plain = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert type(plain) is T5ForConditionalGeneration
    assert plain.state_dict().keys() == model.state_dict().keys()
    again = FiDForConditionalGeneration.from_model(plain.eval())
    assert again is plain
    assert FiDForConditionalGeneration.from_model(again) is again
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    assert torch.equal(
        FiDForConditionalGeneration.from_pretrained(tmp_path).eval()(**batch).logits, again(**batch).logits
    )


def test_collator() -> None:
    made = tokenizer(end=True)
    batch = FiDDataCollator(made)(ROWS)
    assert batch["input_ids"].shape[:2] == (2, 3)
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    texts = [
        [made.decode(ids[mask == 1]) for ids, mask in zip(row, masks, strict=True)]
        for row, masks in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert texts == [
        [
            "Question: who wrote the book\nContext: [1] Sea: Hemingway wrote it in Cuba.</s>",
            "Question: who wrote the book\nContext: [2] The sea is wide.</s>",
            "",
        ],
        [f"Question: who went fishing\nContext: [{i}] {text}</s>" for i, text in enumerate(ROWS[1]["passages"], 1)],
    ]
    for labels, row in zip(batch["labels"], ROWS, strict=True):
        assert made.decode(labels[labels != -100]) == row["answer"] + "</s>"
    assert "labels" not in FiDDataCollator(made)([{k: ROWS[0][k] for k in ("question", "passages")}])
    assert torch.isfinite(fid()(**batch).loss)


def test_collator_cuts_passages_alone() -> None:
    made = tokenizer(end=True)
    row = {**ROWS[0], "passages": ["Hemingway wrote it in Cuba. " * 40]}
    collator = FiDDataCollator(made, max_length=60)
    with pytest.warns(UserWarning, match="longer than the encoder's max_length=60"):
        batch = collator([row])
    assert batch["input_ids"].shape == (1, 1, 60)
    text = made.decode(batch["input_ids"][0, 0])
    assert text.startswith("Question: who wrote the book\nContext: [1] Hemingway wrote it in Cuba.")
    assert text.endswith("</s>")
    whole = made(f"Question: {row['question']}\nContext: [1] {row['passages'][0].strip()}")["input_ids"]
    assert (collator.shortened, collator.cut) == (1, len(whole) - 60)
    with pytest.raises(ValueError, match="never cut"):
        FiDDataCollator(made, max_length=10)([row])
    with pytest.raises(ValueError, match=r"an answer of .* tokens"):
        FiDDataCollator(made, max_answer_length=3)([ROWS[0]])
    with pytest.raises(ValueError, match="nothing to cite"):
        FiDDataCollator(made)([{**ROWS[0], "passages": []}])
    with pytest.raises(ValueError, match="max_length=0"):
        FiDDataCollator(made, max_length=0)


def test_a_tokenizer_that_cannot_write_citations_is_refused() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "So": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    with pytest.raises(ValueError, match="no way to write citations"):
        FiDDataCollator(fast)
    fast.pad_token = None
    with pytest.raises(ValueError, match="no pad_token"):
        FiDDataCollator(fast)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: {**b, "input_ids": b["input_ids"][None]}, "batch, passages, tokens"),
        (lambda b: {**b, "attention_mask": b["attention_mask"][:, 0]}, "make them one"),
        (
            lambda b: {**b, "attention_mask": b["attention_mask"] * torch.tensor([1, 0])[:, None, None]},
            "no passage at all",
        ),
        (lambda b: {k: v[:, :0] if v.dim() == 3 else v for k, v in b.items()}, "have no passages"),
    ],
)
def test_bad_batches(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fid()(**change(passages(2)))


def test_other_models_are_refused(tmp_path: Path) -> None:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    bart = BartForConditionalGeneration(BartConfig(vocab_size=64, **sizes))
    bart.save_pretrained(tmp_path)
    for load in (
        FiDForConditionalGeneration.from_model,
        lambda _: FiDForConditionalGeneration.from_pretrained(tmp_path),
    ):
        with pytest.raises(ValueError, match="model type 'bart'"):
            load(bart)
    with pytest.raises(ValueError, match="T5EncoderModel has no decoder"):
        FiDForConditionalGeneration.from_model(T5EncoderModel(tiny_t5()))
    with pytest.raises(ValueError, match="passages_per_pass=0"):
        fid().checkpoint_passages(0)


def trainer(folder: Path, model: Any, **settings: Any) -> Any:
    args = Seq2SeqTrainingArguments(
        output_dir=str(folder),
        remove_unused_columns=False,
        predict_with_generate=True,
        generation_max_length=6,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        learning_rate=0.01,
        **settings,
    )
    rows = [
        row | {"passages": [p if isinstance(p, dict) else {"title": "", "text": p} for p in row["passages"]]}
        for row in ROWS
    ]
    data = Dataset.from_list(rows)
    made = tokenizer(end=True)
    return Seq2SeqTrainer(
        model,
        args,
        FiDDataCollator(made),
        train_dataset=data,
        eval_dataset=data,
        processing_class=made,
        compute_metrics=lambda p: {"rows": len(p.label_ids)},
    )


def test_seq2seq_trainer(tmp_path: Path) -> None:
    """Trains, predicts with generate, saves as T5; and two steps of one row are one step of two."""
    finals = []
    for name, settings in (
        ("whole", {"per_device_train_batch_size": 2}),
        ("parts", {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}),
    ):
        one = trainer(tmp_path / name, fid(dropout_rate=0.0), max_steps=3, save_strategy="no", **settings)
        one.train()
        finals.append([p.detach().clone() for p in one.model.parameters()])
        metrics = one.evaluate()
        assert metrics["eval_rows"] == 2
        predicted = one.predict(one.eval_dataset).predictions
        batch = FiDDataCollator(tokenizer(end=True))(ROWS)
        direct = one.model.generate(**batch, max_length=6)
        assert (predicted[:, : direct.shape[1]] == direct.numpy()).all()
        assert (predicted[:, direct.shape[1] :] == 0).all()
    for whole, parts in zip(*finals, strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-3, atol=1e-4)
    one.save_model(str(tmp_path / "saved"))
    assert type(AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "saved")) is T5ForConditionalGeneration


@pytest.mark.model("t5")
def test_a_real_t5(model_path: Path) -> None:
    from transformers import AutoTokenizer

    made = AutoTokenizer.from_pretrained(model_path)
    batch = FiDDataCollator(made)(ROWS)
    texts = [
        made.decode(ids[mask == 1]) for ids, mask in zip(batch["input_ids"][0], batch["attention_mask"][0], strict=True)
    ]
    assert "[1] Sea: Hemingway wrote it in Cuba." in texts[0]
    answer = batch["labels"][1]
    assert made.decode(answer[answer != -100], skip_special_tokens=True) == ROWS[1]["answer"]
    model = FiDForConditionalGeneration.from_pretrained(model_path).eval()
    assert model(**batch).loss < 6
