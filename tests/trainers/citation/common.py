"""Tokenizers and models small enough for tests."""

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, T5Config

TEXT = [
    "Question: who wrote the book about the sea and the old man",
    "Answer: Instruction: Query: Context: Document (Title: [1][2][3][4][5][6][7][8][9][10] .",
    "Hemingway wrote it in Cuba. The sea is wide. An old man went fishing.",
]
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def tokenizer(chat: bool = False, end: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE; with `end` each text gets </s>, as T5's tokenizer does it."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<pad>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    bpe.train_from_iterator(TEXT, trainer)
    if end:
        bpe.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="</s>")
    if chat:
        fast.chat_template = CHAT
    return fast


def tiny_t5(config_class: type = T5Config, **changes: Any) -> Any:
    sizes = {"vocab_size": 330, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    ends = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    return config_class(**{**sizes, **ends, **changes})


ROWS = [
    {
        "question": "who wrote the book",
        "passages": [
            {"title": "Sea", "text": "Hemingway wrote it in Cuba."},
            {"title": "", "text": "The sea is wide."},
        ],
        "answer": "Hemingway wrote it [1].",
    },
    {
        "question": "who went fishing",
        "passages": ["An old man went fishing.", "The sea is wide.", "Hemingway wrote it."],
        "answer": "An old man [1]. It is wide [2][3].",
    },
]
