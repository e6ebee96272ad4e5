"""SoFT: one fine-tuning run for many depths, with TRL's parser of command lines and YAML files.

    python examples/soft.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data my.jsonl --output_dir out/soft
    python examples/soft.py --config soft.yaml
    python examples/soft.py --toy --output_dir out/soft

The data are JSON lines with `prompt` and `completion` (or `messages`, or `text`), as SFTTrainer takes them. All fields
of SoFTConfig are options, such as `--exits 12,18,24,30 --max_steps 500 --learning_rate 1e-4`. Writes the model, and the
shallowest model within 10 % of the full depth's loss as a smaller checkpoint that stock transformers loads. `--toy` has
defaults of its own, and takes seconds on a CPU.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checking import check, check_model, read_rows, read_settings
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import TrlParser

from peft_dynamic.trainers import SoFTConfig, SoFTTrainer, truncate_to_exit


@dataclass
class Arguments:
    model: str | None = field(default=None, metadata={"help": "Name or folder of the model."})
    data: str | None = field(default=None, metadata={"help": "JSON lines to train on; a tenth is kept to evaluate."})
    toy: bool = field(default=False, metadata={"help": "A tiny model that learns to count, in seconds."})


def toy() -> tuple[Any, Any, Dataset]:
    words = Tokenizer(models.WordLevel({"</s>": 0, "?": 1} | {str(i): i + 2 for i in range(30)}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="</s>", unk_token="?")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 4}
    rows = [{"prompt": f"{i} {i + 1} ", "completion": f"{i + 2} {i + 3}"} for i in range(27)] * 8
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)), tokenizer, Dataset.from_list(rows)


def main(arguments: Arguments, config: SoFTConfig, data: list[dict[str, Any]]) -> None:
    model, tokenizer, rows = toy() if arguments.toy else (arguments.model, None, Dataset.from_list(data))
    parts = rows.train_test_split(test_size=0.1, seed=0)
    trainer = SoFTTrainer(
        model, config, train_dataset=parts["train"], eval_dataset=parts["test"], processing_class=tokenizer
    )
    trainer.train()
    losses = trainer.evaluate()
    for depth in trainer.eval_exits:
        print(f"after {depth} layers: loss {losses[f'eval_exit_{depth}_loss']:.3f}")
    trainer.save_model(str(Path(config.output_dir) / "model"))

    full = losses[f"eval_exit_{trainer.eval_exits[-1]}_loss"]
    depth = next(k for k in trainer.eval_exits if losses[f"eval_exit_{k}_loss"] <= 1.1 * full)
    folder = Path(config.output_dir) / f"{depth}-layers"
    truncate_to_exit(trainer.model, depth).save_pretrained(folder)
    trainer.processing_class.save_pretrained(folder)
    print(f"the model of {depth} layers is in {folder}")


if __name__ == "__main__":
    parser = TrlParser((Arguments, SoFTConfig))
    if "--toy" in sys.argv:
        # TRL's rate is for a pretrained model; this one starts from nothing.
        parser.set_defaults(learning_rate=1e-2, num_train_epochs=8, exits=[1, 2, 4], report_to="none")
    arguments, config = read_settings(parser)
    rows = []
    if not arguments.toy:
        if arguments.model is None or arguments.data is None:
            parser.error("--model and --data: name both, or pass --toy")
        check_model(parser, "--model", arguments.model)
        rows = read_rows(parser, "--data", arguments.data, ("prompt", "completion"), ("messages",), ("text",))
        check(parser, len(rows) > 1, "--data", arguments.data, "a file of two rows or more: one is kept to evaluate")
    main(arguments, config, rows)
