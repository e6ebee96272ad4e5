"""A model at many depths: the exit curve, a smaller checkpoint, adaptive and speculative decoding.

    python examples/exit_early.py --model MODEL --text "Once upon a time" --output out

For texts worth reading at an early exit pass a model that was trained with SoFTTrainer, see examples/soft.py.
"""

import argparse
from pathlib import Path

from checking import check_model, whole
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_dynamic.trainers import (
    calibrate_thresholds,
    exit_at,
    exit_curve,
    generate_adaptive,
    generate_speculative,
    truncate_to_exit,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", default="The restaurant by the river serves")
    parser.add_argument("--tokens", type=whole(1), default=32)
    parser.add_argument("--output", type=Path, default=Path("exit-early-out"))
    args = parser.parse_args()
    check_model(parser, "--model", args.model)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model).eval()
    inputs = tokenizer(args.text, return_tensors="pt")
    inputs = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}

    # 1. What each depth is worth. Put your validation loss here.
    curve = exit_curve(
        model, lambda model: {"loss": float(model(**inputs, labels=inputs["input_ids"]).loss)}, latency_tokens=8
    )
    print(curve.table())
    exit = curve.recommend(tolerance=0.05).exit

    # 2. One depth, for a while or for good.
    with exit_at(model, exit):
        tokens = model.generate(**inputs, max_new_tokens=args.tokens, do_sample=False)
    print(f"exit {exit}: {tokenizer.decode(tokens[0], skip_special_tokens=True)}")
    truncate_to_exit(model, exit).save_pretrained(args.output / "small")
    tokenizer.save_pretrained(args.output / "small")

    # 3. Each token at the first exit that is sure of it. Put your validation batches here.
    found = calibrate_thresholds(model, [inputs], agreement=0.9)
    print(f"thresholds {found.thresholds}, {found.agreement:.0%} agreement, {found.cost:.0%} of the work")
    output = generate_adaptive(model, **inputs, thresholds=found.thresholds, max_new_tokens=args.tokens)
    print(f"adaptive, mean exit {output.mean_exit:.1f}: {tokenizer.decode(output.sequences[0])}")

    # 4. What all layers say, drafted by the first third of them.
    draft = max(1, model.config.num_hidden_layers // 3)
    text = generate_speculative(model, **inputs, exit=draft, max_new_tokens=args.tokens)
    print(f"speculative, {text.acceptance:.0%} of the drafts accepted: {tokenizer.decode(text.sequences[0])}")


if __name__ == "__main__":
    main()
