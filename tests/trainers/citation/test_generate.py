"""answer_questions: what a model says to each question, the same in a batch as alone."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, T5ForConditionalGeneration

from peft_dynamic.trainers import (
    CitationDataCollator,
    FiDDataCollator,
    FiDForConditionalGeneration,
    answer_questions,
)

from .common import ROWS, tiny_t5, tokenizer


def models() -> dict[str, tuple[Any, Any]]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=330, pad_token_id=0, eos_token_id=1, **sizes))
    t5 = FiDForConditionalGeneration.from_model(T5ForConditionalGeneration(tiny_t5()))
    return {
        "decoder": (llama, CitationDataCollator(tokenizer())),
        "fid": (t5, FiDDataCollator(tokenizer(end=True))),
    }


@pytest.mark.parametrize("kind", ["decoder", "fid"])
def test_answers(kind: str) -> None:
    model, collator = models()[kind]
    model.train()
    options = {"max_new_tokens": 6, "do_sample": False}
    together = answer_questions(model, collator, ROWS, **options)
    assert model.training
    assert together == answer_questions(model, collator, ROWS, batch_size=1, **options)
    # What T5 or Llama says without our helper, to the same tokens.
    batch = collator([{key: ROWS[0][key] for key in ("question", "passages")}])
    made = model.eval().generate(**batch, **options)[0]
    if kind == "decoder":
        made = made[batch["input_ids"].shape[1] :]
    assert together[0] == collator.tokenizer.decode(made, skip_special_tokens=True).strip()
    assert together[0]
    with pytest.raises(ValueError, match="batch_size=0"):
        answer_questions(model, collator, ROWS, batch_size=0)
