"""Train a LoRA, in the second half with a density loss, and see how many neurons are still active.

    python examples/density_loss.py --model google-t5/t5-small --data my.jsonl --output out/density
    python examples/density_loss.py --model google/flan-t5-small --keep 0.3 --data my.jsonl --output out/density
    python examples/density_loss.py --toy --output out/density

The data are JSON lines with `source` and `target`. `--keep` also cuts each layer, in the second half and afterwards,
down to this share of its activations: for models whose activation has no zeros of its own, such as Flan-T5's GELU. The
thresholds are written beside the adapter. `--toy` makes a small ReLU model and its data on the spot: seconds on a CPU.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from checking import above_zero, check_model, read_rows, whole
from peft import LoraConfig, get_peft_model
from transformers import T5Config, T5ForConditionalGeneration

from peft_dynamic import ActivationDensityLoss, calibrate_cut, cut_activations, measure_density


def toy() -> tuple[Any, list[dict[str, torch.Tensor]]]:
    """The task: repeat the input."""
    torch.manual_seed(0)
    config = T5Config(vocab_size=32, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
    ids = torch.randint(2, 32, (16, 8, 6))
    return T5ForConditionalGeneration(config), [{"input_ids": each, "labels": each} for each in ids]


def from_rows(name: str, rows: list[dict[str, str]]) -> tuple[Any, list[Any]]:
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name)
    batches = []
    for first in range(0, len(rows), 8):
        some = rows[first : first + 8]
        batch = tokenizer([row["source"] for row in some], padding=True, truncation=True, return_tensors="pt")
        target = tokenizer([row["target"] for row in some], padding=True, truncation=True, return_tensors="pt")
        batch["labels"] = target["input_ids"].masked_fill(target["attention_mask"] == 0, -100)
        batches.append(batch)
    return AutoModelForSeq2SeqLM.from_pretrained(name), batches


def main(arguments: argparse.Namespace, rows: list[dict[str, str]]) -> None:
    base, batches = toy() if arguments.toy else from_rows(arguments.model, rows)
    before = measure_density(base, batches[:4])
    model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear", task_type="SEQ_2_SEQ_LM"))
    density = ActivationDensityLoss(weight=0.0, eps=arguments.eps).attach(model)
    arguments.output.mkdir(parents=True, exist_ok=True)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=arguments.lr)
    model.train()
    for step in range(arguments.steps):
        if step == arguments.steps // 2:
            if arguments.keep is not None:
                thresholds = calibrate_cut(model, batches[:8], density=arguments.keep)
                (arguments.output / "thresholds.json").write_text(json.dumps(thresholds, indent=1), encoding="utf-8")
                cut_activations(model, thresholds)
            density.weight = arguments.weight
        # Nothing else to call: outputs.loss has the term
        loss = model(**batches[step % len(batches)]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.3f}, density_loss {density.value.item():.3f}")
    after = measure_density(model, batches[:4])
    print(after.table())
    print(f"active neurons: {before.mean():.1%} -> {after.mean():.1%}, {after.reduction(before):.1%} fewer")
    after.to_json(arguments.output / "density.json")
    after.plot(arguments.output / "density.png", title="Density after training", before=before)
    model.save_pretrained(arguments.output / "adapter")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="google-t5/t5-small")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--output", type=Path, default=Path("out/density"))
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--steps", type=whole(1), default=200)
    parser.add_argument("--weight", type=float, default=1.0)
    parser.add_argument("--keep", type=float, help="share of each layer's activations that a cut leaves, such as 0.3")
    parser.add_argument("--eps", type=above_zero, default=1e-2)
    parser.add_argument("--lr", type=above_zero, default=1e-2)
    given = parser.parse_args()
    if given.data is None and not given.toy:
        parser.error("--data: name JSON lines with `source` and `target`, or pass --toy")
    if given.keep is not None and not 0 < given.keep < 1:
        parser.error(f"--keep {given.keep}: it is a share above 0 and below 1; 0.3 sets 70 % of the activations to 0")
    rows = []
    if not given.toy:
        check_model(parser, "--model", given.model)
        rows = read_rows(parser, "--data", given.data, ("source", "target"))
    main(given, rows)
