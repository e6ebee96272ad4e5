"""A tokenizer of a few whole words, the tags and labels among them."""

from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHAT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def tokenizer() -> Any:
    names = ["<e>", "a", "<Judgement>", "</Judgement>", "Yes", "No"]
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(names)}, unk_token="a"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<e>", pad_token="<e>", unk_token="a")
    made.chat_template = CHAT
    return made
