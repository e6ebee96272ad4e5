"""What `peft-dynamic train` does once its arguments are right, stage by stage."""

from __future__ import annotations

import contextlib
import json
import math
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from rich.console import Console
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from peft_dynamic.export import export_lora
from peft_dynamic.ranks import RankCurve, adapters_disabled, rank_curve
from peft_dynamic.tuners.qdylora import QDyLoRAConfig

from ._data import Example, encode, prompt_text
from ._load import fast_dtype, without_hosts_warnings
from .train import Job, UserError

SAMPLE_TOKENS = 60
console = Console()

# Runs in a process of its own, which never imports peft_dynamic: what a user without this package sees.
STOCK = """
import json, sys, torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
job = json.loads(sys.argv[1])
settings = {"dtype": getattr(torch, job["dtype"])}
if job["quantization"]:
    settings["quantization_config"] = BitsAndBytesConfig.from_dict(job["quantization"])
base = AutoModelForCausalLM.from_pretrained(job["model"], **settings).to(job["device"])
model = PeftModel.from_pretrained(base, job["adapter"]).eval()
saved = load_file(job["batch"], device=job["device"])
expected = saved.pop("logits")
with torch.no_grad():
    output = model(**saved)
difference = (output.logits.float() - expected.float()).abs().max().item()
assert not [name for name in sys.modules if name.startswith("peft_dynamic")]
print("RESULT " + json.dumps({
    "equal": torch.equal(output.logits, expected),
    "difference": difference,
    "scale": expected.float().abs().max().item(),
    "loss": output.loss.item(),
    "rank": model.peft_config["default"].r,
}))
"""


def run(job: Job, started: float) -> None:
    """Train, measure each rank, export the recommended one, check it, and leave a report."""
    seconds: dict[str, float] = {"getting ready": time.perf_counter() - started}

    @contextlib.contextmanager
    def stage(name: str) -> Any:
        console.rule(f"[bold]{name}", align="left")
        begin = time.perf_counter()
        yield
        seconds[name] = time.perf_counter() - begin

    job.output.mkdir(parents=True, exist_ok=True)
    set_seed(job.seed)
    with stage("load"):
        dtype = fast_dtype()
        quantization = QDyLoRAConfig.quantization_config(compute_dtype=dtype) if job.four_bit else None
        model, tokenizer = _load(job, dtype, quantization)
        examples = encode(job.examples, tokenizer, job.max_length)
        held_out = encode(job.held_out, tokenizer, job.max_length)
        for option, given, kept in (("--data", job.examples, examples), ("--eval-data", job.held_out, held_out)):
            if not kept:
                raise UserError(
                    f"{option}: of {len(given)} examples none has a part to learn within --max-length {job.max_length} "
                    "tokens. Raise it, or shorten the prompts."
                )
            if len(kept) < len(given):
                console.print(
                    f"{option}: {len(given) - len(kept)} of {len(given)} examples left out: what is learnt lies beyond "
                    f"--max-length {job.max_length}."
                )
        model.print_trainable_parameters()
        console.print(
            f"{len(examples)} examples to train on, {len(held_out)} held out; ranks {job.config.ranks}; "
            f"{str(dtype).removeprefix('torch.')} on {_device(model)}"
        )
    with stage("train"):
        trainer = _trainer(job, model, tokenizer, examples, dtype)
        trained = trainer.train(resume_from_checkpoint=True if job.resume else None)
        # Trainer leaves the forward pass under its own autocast; from here on precision is chosen where it matters
        model = trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        model.save_pretrained(str(job.output / "adapter"))
        tokenizer.save_pretrained(str(job.output / "adapter"))
    batches = _batches(held_out, tokenizer, job.batch_size)
    with stage("measure each rank"):
        curve = rank_curve(model, lambda m: held_out_loss(m, batches, dtype))
        best = curve.recommend(job.tolerance)
        console.print(curve.table(), end="", highlight=False)
        console.print(
            f"Recommended: rank {best}, the smallest within {job.tolerance:.3g} (relative) of the best rank's loss."
        )
        curve.to_json(job.output / "curve.json")
        for suffix in ("png", "svg"):
            curve.plot(job.output / f"curve.{suffix}", title=f"{Path(job.model).name}: one training run, each rank")
    with stage("export and check"):
        model.set_rank(best)
        export_lora(model, job.output / "lora", rank=best)
        check = _check_in_stock_peft(job, model, batches[0], dtype, quantization)
        how = "bit for bit" if check["equal"] else f"up to {check['difference']:.2g} (of {check['scale']:.3g})"
        console.print(f"PEFT alone, in a second process, computes the same logits {how}; loss {check['loss']:.4f}.")
    with stage("samples"):
        samples = _samples(model, tokenizer, job.held_out[:2], dtype, best)
        for prompt, answers in samples:
            console.print(prompt, style="bold", highlight=False, markup=False)
            for who, answer in answers.items():
                console.print(f"  {who}: {answer}", highlight=False, markup=False)
    seconds["in all"] = time.perf_counter() - started
    _report(job, curve, best, check, samples, seconds, trained.global_step, dtype)
    console.rule("[bold]done", align="left")
    console.print(f"In {seconds['in all']:.0f} s. Look at:", highlight=False)
    for name, what in (
        ("report.md", "all of this, to read"),
        ("curve.png", "the plot; also curve.svg, curve.json"),
        ("adapter", "the adapter at every rank; needs `import peft_dynamic`"),
        ("lora", f"rank {best} as a stock LoRA adapter; needs PEFT alone"),
    ):
        console.print(f"  {job.output / name}  {what}", highlight=False, markup=False, soft_wrap=True)


def _load(job: Job, dtype: torch.dtype, quantization: Any) -> tuple[Any, Any]:
    settings = {"quantization_config": quantization} if quantization else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(job.model)
        base = AutoModelForCausalLM.from_pretrained(job.model, dtype=dtype, **settings)
    except (OSError, ValueError) as error:
        raise UserError(f"--model: {job.model!r} could not be loaded as a causal language model. {error}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    if not quantization:
        base.to("cuda" if torch.cuda.is_available() else "cpu")
    with without_hosts_warnings():
        try:
            return get_peft_model(base, job.config), tokenizer
        except ValueError as error:
            raise UserError(f"--target-modules or --4bit do not fit {job.model}: {error}") from error


def _trainer(job: Job, model: Any, tokenizer: Any, examples: list[dict[str, list[int]]], dtype: torch.dtype) -> Trainer:
    steps = job.steps if job.steps > 0 else math.ceil(len(examples) / job.batch_size * job.epochs)
    arguments = TrainingArguments(
        output_dir=str(job.output / "checkpoints"),
        max_steps=steps,
        per_device_train_batch_size=job.batch_size,
        learning_rate=job.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 20),
        logging_steps=max(1, steps // 10),
        save_strategy="steps" if job.save_steps else "no",
        save_steps=job.save_steps or 500,
        bf16=dtype == torch.bfloat16,
        use_cpu=not torch.cuda.is_available(),
        seed=job.seed,
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
        label_names=["labels"],
    )
    collator = DataCollatorForSeq2Seq(tokenizer, padding=True, label_pad_token_id=-100)
    limits = [_TimeLimit(60 * job.max_minutes)] if job.max_minutes else []
    return Trainer(model=model, args=arguments, train_dataset=examples, data_collator=collator, callbacks=limits)


class _TimeLimit(TrainerCallback):
    """Ends the training at the first step after a time."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.end = time.monotonic() + self.seconds

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if time.monotonic() > self.end and state.global_step < state.max_steps:
            console.print(f"Ended after step {state.global_step} of {state.max_steps}: --max-minutes is over.")
            control.should_training_stop = True


def _batches(encoded: list[dict[str, list[int]]], tokenizer: Any, size: int) -> list[dict[str, torch.Tensor]]:
    """Padded batches, examples of a length together."""
    collator = DataCollatorForSeq2Seq(tokenizer, padding=True, label_pad_token_id=-100)
    ordered = sorted(encoded, key=lambda example: len(example["input_ids"]))
    return [dict(collator(ordered[i : i + size])) for i in range(0, len(ordered), size)]


def _device(model: Any) -> torch.device:
    return next(model.parameters()).device


def _autocast(model: Any, dtype: torch.dtype) -> Any:
    return torch.autocast(_device(model).type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


def held_out_loss(model: Any, batches: list[dict[str, torch.Tensor]], dtype: torch.dtype) -> dict[str, float]:
    """Mean loss per learnt token over all batches, and its exponential, the perplexity."""
    total, count = 0.0, 0
    for batch in batches:
        with _autocast(model, dtype):
            loss = model(**{key: value.to(_device(model)) for key, value in batch.items()}).loss
        tokens = int((batch["labels"][:, 1:] != -100).sum())  # the first token of a row is predicted from nothing
        total, count = total + loss.item() * tokens, count + tokens
    mean = total / count
    return {"loss": mean, "perplexity": math.exp(mean) if mean < 700 else math.inf}


def _check_in_stock_peft(
    job: Job, model: Any, batch: dict[str, torch.Tensor], dtype: torch.dtype, quantization: Any
) -> dict[str, Any]:
    """Logits of the exported adapter in a process without peft_dynamic, against ours."""
    inputs = {key: value[:2].to(_device(model)) for key, value in batch.items()}
    was_training = model.training
    model.eval()
    with torch.no_grad():
        logits = model(**inputs).logits
    model.train(was_training)
    with tempfile.TemporaryDirectory() as work:
        saved = {key: value.contiguous().cpu() for key, value in {**inputs, "logits": logits}.items()}
        save_file(saved, Path(work, "batch.safetensors"))
        task = {
            "model": job.model,
            "adapter": str(job.output / "lora"),
            "batch": str(Path(work, "batch.safetensors")),
            "dtype": str(dtype).removeprefix("torch."),
            "device": str(_device(model)),
            "quantization": quantization.to_dict() if quantization else None,
        }
        done = subprocess.run([sys.executable, "-c", STOCK, json.dumps(task)], capture_output=True, text=True)
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
    if done.returncode or line is None:
        raise UserError(
            f"stock PEFT could not load {job.output / 'lora'}. This is a bug, please report it:\n{done.stderr}"
        )
    result: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
    if not result["difference"] <= 0.05 * result["scale"]:
        raise UserError(
            f"stock PEFT computes other logits from {job.output / 'lora'}: the greatest difference is "
            f"{result['difference']:.3g}. This is a bug, please report it. The adapter is in {job.output / 'adapter'}."
        )
    return result


def _samples(
    model: Any, tokenizer: Any, examples: list[Example], dtype: torch.dtype, rank: int
) -> list[tuple[str, dict[str, str]]]:
    """For each example: what is given, and the answers of the base model and of the adapter."""
    model.eval()

    def answer(prompt: str) -> str:
        inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(_device(model))
        with torch.no_grad(), _autocast(model, dtype):
            ids = model.generate(
                **inputs, max_new_tokens=SAMPLE_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
        return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    samples = []
    for example in examples:
        # of plain text, the first words
        prompt = prompt_text(example, tokenizer) or " ".join(example.learnt.split()[:8])
        with adapters_disabled(model):
            before = answer(prompt)
        shown = example.given[-1]["content"] if example.given else prompt
        samples.append((shown, {"base model": before, f"rank {rank}": answer(prompt), "reference": example.learnt}))
    return samples


def _report(
    job: Job,
    curve: RankCurve,
    best: int,
    check: dict[str, Any],
    samples: list[tuple[str, dict[str, str]]],
    seconds: dict[str, float],
    steps: int,
    dtype: torch.dtype,
) -> None:
    names = curve.metrics
    rows = [f"| rank | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
    for row in curve.rows:
        label = "base model" if row.rank is None else f"**{row.rank}**" if row.rank == best else str(row.rank)
        rows.append(f"| {label} | {' | '.join(f'{row.metrics[name]:.4f}' for name in names)} |")
    how = (
        "bit for bit"
        if check["equal"]
        else f"to within {check['difference']:.2g}, their greatest being {check['scale']:.3g}"
    )
    quoted = []
    for prompt, answers in samples:
        quoted += ["```text", prompt, "", *(f"[{who}] {answer}" for who, answer in answers.items()), "```", ""]
    text = f"""# One training run, every rank

{job.model} on {job.data}: {len(job.examples)} examples, {steps} steps of {job.batch_size},
learning rate {job.learning_rate:g}, r = {job.config.r}, ranks {job.config.ranks}, lora_alpha {job.config.lora_alpha:g},
truncation {job.config.truncation}, rank sampling {job.config.rank_sampling}, scaling {job.config.scaling},
seed {job.seed},
{"4-bit base, " if job.four_bit else ""}{str(dtype).removeprefix("torch.")}, {platform.machine()}.

## The rank curve

Over {len(job.held_out)} held-out examples: the loss per learnt token, and its exponential.

{chr(10).join(rows)}

![rank curve](curve.png)

Recommended: rank {best}, the smallest whose loss is within {job.tolerance:.3g} (relative) of the best rank's.
It is in `lora/` as a stock LoRA adapter. PEFT alone, in a process that never imports peft_dynamic, computes the same
logits {how}.

## Samples

{chr(10).join(quoted)}
## Use it

At any rank:

```python
import peft_dynamic
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("{job.output / "adapter"}")
model.set_rank({best})
```

The recommended rank, without peft_dynamic:

```python
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("{job.output / "lora"}")
```

Seconds: {", ".join(f"{name} {value:.0f}" for name, value in seconds.items())}.
"""
    (job.output / "report.md").write_text(text, encoding="utf-8")
