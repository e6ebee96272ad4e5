"""Prompts, the fitting of passages, CitationDataCollator, and both under TRL's SFTTrainer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from peft_dynamic.trainers.citation.collators import CitationDataCollator
from peft_dynamic.trainers.citation.formats import FORMATS, CitationFormat, Fitter, citation_prompt_completion, share

from .common import CHAT, ROWS, tokenizer

LONG = {
    "question": "who wrote the book",
    "passages": ["The sea is wide. " * 30, "Hemingway wrote it in Cuba.", "An old man went fishing. " * 20],
    "answer": "Hemingway wrote it in Cuba [2].",
}
PLAIN = CitationFormat("plain", "Do.", "Q: {question}\n{passages}", lambda i, p: f"[{i}] {p['text']}")


def test_layouts() -> None:
    passages = [{"title": "Sea", "text": "It is wide."}, {"title": "", "text": "Deep too."}]
    alce, citer = (FORMATS[name].prompt("How?", passages) for name in ("alce", "citer"))
    assert alce.startswith("Instruction: ")
    assert alce.endswith(
        "\n\nQuestion: How?\n\nDocument [1](Title: Sea): It is wide.\nDocument [2]: Deep too.\n\nAnswer:"
    )
    assert citer.endswith("\n\nQuery: How?\nContext:\n[1] Sea: It is wide.\n[2] Deep too.\n\nAnswer:")
    assert FORMATS["alce"].prompt("How?", passages, chat=True) + "\n\nAnswer:" == alce


@pytest.mark.parametrize(
    ("lengths", "room", "kept"),
    [
        ([5, 1, 9], 9, [4, 1, 4]),
        ([5, 1, 9], 15, [5, 1, 9]),
        ([3, 3], 3, [1, 2]),
        ([4], 0, [0]),
        ([2, 9, 9], 12, [2, 5, 5]),
    ],
)
def test_share(lengths: list[int], room: int, kept: list[int]) -> None:
    assert share(lengths, room) == kept


@given(st.lists(st.integers(0, 50), min_size=1, max_size=8), st.integers(0, 200))
def test_share_is_level_and_uses_the_room(lengths: list[int], room: int) -> None:
    kept = share(lengths, room)
    assert sum(kept) == min(room, sum(lengths))
    cut = [k for k, n in zip(kept, lengths, strict=True) if k < n]
    if cut:
        assert max(cut) - min(cut) <= 1
        assert max(kept) <= max(cut) + 1  # what can't be divided goes to the last


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("max_length", [90, 120, 200, 2000])
def test_only_passages_are_cut(chat: bool, max_length: int) -> None:
    made = tokenizer(chat=chat)
    if max_length < 300:
        with pytest.warns(UserWarning, match=f"cut in 1 rows, by .* to fit into max_length={max_length}"):
            data = citation_prompt_completion([LONG], made, format=PLAIN, max_length=max_length)
    else:
        data = citation_prompt_completion([LONG], made, format=PLAIN, max_length=max_length)
    prompt, completion = data[0]["prompt"], data[0]["completion"]
    if chat:
        assert completion == [{"role": "assistant", "content": LONG["answer"]}]
        text = prompt[0]["content"]
        ids = made.apply_chat_template(prompt + completion, return_dict=True)["input_ids"]
    else:
        assert completion == f" {LONG['answer']}</s>"
        text = prompt.removesuffix("\n\nAnswer:")
        ids = made(prompt + completion)["input_ids"]
    assert len(ids) <= max_length
    head, *lines = text.split("\n[")
    assert head == f"Do.\n\nQ: {LONG['question']}"
    assert len(lines) == 3
    for i, (line, passage) in enumerate(zip(lines, LONG["passages"], strict=True), 1):
        assert line.startswith(f"{i}] ")
        assert passage.startswith(line[3:])
    if max_length == 200:  # the short one is whole, and the room is used
        assert lines[1] == "2] Hemingway wrote it in Cuba."
        assert len(ids) > 190
    if max_length == 2000:
        assert [line[3:] for line in lines] == [passage.strip() for passage in LONG["passages"]]


@pytest.mark.parametrize("chat", [False, True])
def test_collator_masks_the_prompt(chat: bool) -> None:
    made = tokenizer(chat=chat)
    batch = CitationDataCollator(made, format="citer", max_length=None)(ROWS)
    for row, ids, labels, mask in zip(ROWS, batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        answer = f"{row['answer']}</s>\n" if chat else f" {row['answer']}</s>"
        assert made.decode(labels[labels != -100]) == answer
        assert torch.equal(ids[labels != -100], labels[labels != -100])
        real = made.decode(ids[mask == 1])
        assert real.endswith(answer)
        assert "Query: " + row["question"] in real
        assert (ids[mask == 0] == 0).all()
        assert (labels[mask == 0] == -100).all()


def test_a_chat_whose_generation_prompt_is_no_beginning_of_the_answer() -> None:
    made = tokenizer(chat=True)
    made.chat_template = CHAT.replace("<|assistant|>\n", "<|assistant|>\n<think></think>")
    turn = [{"role": "user", "content": "Go."}]
    assert "<think>" in made.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    batch = CitationDataCollator(made, max_length=None)(ROWS)
    for row, ids, labels in zip(ROWS, batch["input_ids"], batch["labels"], strict=True):
        assert "<think>" not in made.decode(ids)
        assert made.decode(labels[labels != -100]) == f"{row['answer']}</s>\n", "none of the answer is masked"


def test_each_passage_keeps_a_token_or_the_row_is_refused() -> None:
    made = tokenizer()
    fitter = Fitter(made, PLAIN, None, None)
    bare = [{"title": "", "text": ""}] * 3
    fixed = len(fitter.tokens(*fitter.turns(LONG["question"], bare, LONG["answer"]))[0])
    with pytest.raises(ValueError, match=f"needs {fixed} tokens without the texts of its 3 passages"):
        CitationDataCollator(made, format=PLAIN, max_length=fixed + 2)([LONG])
    with pytest.warns(UserWarning, match="passages were cut"):
        batch = CitationDataCollator(made, format=PLAIN, max_length=fixed + 3)([LONG])
    assert batch["input_ids"].shape[1] <= fixed + 3


def test_collator_without_answers_pads_on_the_left() -> None:
    made = tokenizer()
    rows = [{key: row[key] for key in ("question", "passages")} for row in ROWS]
    batch = CitationDataCollator(made, max_length=None, pad_to_multiple_of=16)(rows)
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["input_ids"].shape[1] % 16 == 0
    for row, ids, mask in zip(rows, batch["input_ids"], batch["attention_mask"], strict=True):
        assert mask[-1] == 1
        assert (mask.diff() >= 0).all()
        assert made.decode(ids[mask == 1]).endswith("Answer:")
        assert row["question"] in made.decode(ids[mask == 1])


def test_collator_counts_what_it_cuts() -> None:
    collator = CitationDataCollator(tokenizer(), format=PLAIN, max_length=200)
    whole = len(CitationDataCollator(tokenizer(), format=PLAIN, max_length=None)([LONG])["input_ids"][0])
    with pytest.warns(UserWarning, match="passages were cut"):
        width = collator([LONG])["input_ids"].shape[1]
    assert (collator.shortened, collator.cut) == (1, whole - width)
    collator([LONG])  # counted, and not said again
    assert collator.shortened == 2


@pytest.mark.parametrize(
    ("row", "arguments", "message"),
    [
        ({}, {"max_length": 60}, "never cut"),
        ({"passages": []}, {}, "nothing to cite"),
        ({"passages": None}, {}, "nothing to cite"),
        ({"answer": " "}, {}, "the answer ' '"),
        ({"question": ""}, {}, "the question ''"),
        ({}, {"format": "harvard"}, "format='harvard'"),
        ({}, {"chat": True}, "no chat template"),
        ({}, {"max_length": 0}, "max_length=0"),
    ],
)
def test_bad_input(row: dict[str, Any], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CitationDataCollator(tokenizer(), **arguments)([ROWS[0] | row])
    with pytest.raises(ValueError, match=message):
        citation_prompt_completion([ROWS[0] | row], tokenizer(), **arguments)


def test_answers_in_some_rows_only() -> None:
    with pytest.raises(ValueError, match="not both"):
        CitationDataCollator(tokenizer())([ROWS[0], {**ROWS[1], "answer": None}])
    with pytest.raises(ValueError, match="nothing to learn"):
        citation_prompt_completion([{**ROWS[1], "answer": None}], tokenizer())
    without = tokenizer()
    without.eos_token = None
    with pytest.raises(ValueError, match="no eos_token"):
        CitationDataCollator(without)


def tiny_llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=330, pad_token_id=0, eos_token_id=1, **sizes))


def sft(folder: Path, made: Any, data: Any, collator: Any = None, **settings: Any) -> Any:
    from trl import SFTConfig, SFTTrainer

    settings = {"max_length": 1024, "per_device_train_batch_size": 2, "max_steps": 2, "learning_rate": 0.01} | settings
    fixed = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "shuffle_dataset": False}
    args = SFTConfig(output_dir=str(folder), gradient_checkpointing=False, disable_tqdm=True, **fixed, **settings)
    return SFTTrainer(tiny_llama(), args, train_dataset=data, processing_class=made, data_collator=collator)


@pytest.mark.parametrize("chat", [False, True])
def test_sft_trainer_sees_the_collators_tokens(tmp_path: Path, chat: bool) -> None:
    made = tokenizer(chat=chat)
    trainer = sft(tmp_path, made, citation_prompt_completion(ROWS, made))
    collator = CitationDataCollator(made)
    theirs = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    ours = collator(ROWS)
    for key in ("input_ids", "labels", "attention_mask"):
        assert torch.equal(theirs[key], ours[key]), key
    skip = {"remove_unused_columns": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
    plain = [
        row | {"passages": [p if isinstance(p, dict) else {"title": "", "text": p} for p in row["passages"]]}
        for row in ROWS
    ]
    other = sft(tmp_path, made, Dataset.from_list(plain), collator, **skip)
    losses = [t.train().training_loss for t in (trainer, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] > 0.1


@pytest.mark.parametrize(
    "settings", [{"packing": True}, {"padding_free": True, "max_length": None}], ids=["packing", "padding_free"]
)
def test_packed_and_padding_free_losses_are_the_padded_one(tmp_path: Path, settings: dict[str, Any]) -> None:
    made = tokenizer()
    data = citation_prompt_completion(ROWS, made)
    losses = []
    for changes in ({}, settings):
        trainer = sft(tmp_path, made, data, max_steps=1, **changes)
        labels = [label for row in trainer.train_dataset for label in row["labels"] if label != -100]
        answers = made.decode(labels).split("</s>")[:-1]  # packing puts the longest first
        assert sorted(answers) == sorted(f" {row['answer']}" for row in ROWS)
        losses.append(trainer.train().training_loss)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
