"""DyLoRA with TRL's SFTTrainer: the adapter is a `peft_config` like any other.

    python examples/sft_trainer.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data my.jsonl --output out/sft

The data are JSON lines with `prompt` and `completion` (or `messages`, or `text`), as SFTTrainer takes them.
"""

import argparse
from pathlib import Path

import torch
from checking import check, check_model, read_rows, whole
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from peft_dynamic import DyLoRAConfig
from peft_dynamic.export import export_lora
from peft_dynamic.ranks import rank_curve


def main(model: str, data: list[dict], output: Path, steps: int) -> None:
    rows = Dataset.from_list(data).train_test_split(test_size=0.1, seed=0)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(output / "checkpoints"),
            max_steps=steps,
            per_device_train_batch_size=8,
            learning_rate=5e-4,
            use_cpu=not torch.cuda.is_available(),
            report_to="none",
        ),
        train_dataset=rows["train"],
        eval_dataset=rows["test"],
        peft_config=DyLoRAConfig(r=16, ranks=[1, 2, 4, 8, 16], target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model(str(output / "adapter"))

    curve = rank_curve(trainer.model, lambda _: {"loss": trainer.evaluate()["eval_loss"]})
    best = curve.recommend(tolerance=0.01)
    print(curve.table())
    print(f"rank {best} is in {export_lora(trainer.model, output / 'lora', rank=best)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("out/sft"))
    parser.add_argument("--steps", type=whole(1), default=200)
    arguments = parser.parse_args()
    check_model(parser, "--model", arguments.model)
    rows = read_rows(parser, "--data", arguments.data, ("prompt", "completion"), ("messages",), ("text",))
    check(parser, len(rows) > 1, "--data", arguments.data, "a file of two rows or more: one is kept to evaluate")
    main(arguments.model, rows, arguments.output, arguments.steps)
