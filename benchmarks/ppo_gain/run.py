"""PPO, GRPO, RLOO and more supervision, each from the same start: numbers to be sorted, by a small model made here.

The task has three levels, three to five numbers. A start is trained for so many steps on few rows with answers. From
it, each with a LoRA of its own and for as much processor time as ppo took:

- ppo, grpo, rloo: on further rows. No answers are used: a program says whether a completion is right.
- again: supervised, on the rows with answers that the start had.
- further: supervised, on the answers of the further rows, which the others do not see.

All are scored after the last step, on the same rows.
"""

import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
    get_constant_schedule_with_warmup,
    set_seed,
)
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from benchmarks.study import Cell, Context, Lines
from benchmarks.tasks import Batch, collate, completed
from benchmarks.training import adamw, descended, fit
from peft_dynamic.trainers import PPOConfig, PPOTrainer
from peft_dynamic.trainers.rewards.nlu_eval import generate_answers

NUMBERS = 50  # 0 to 49, a token each
LEVELS = (3, 4, 5)  # how many are to be sorted
Row = dict[str, str]


def rows(draw: random.Random, number: int) -> list[Row]:
    """The levels in turn."""
    found = []
    for i in range(number):
        numbers = draw.sample(range(NUMBERS), LEVELS[i % len(LEVELS)])
        prompt, answer = (" ".join(map(str, each)) for each in (numbers, sorted(numbers)))
        found.append({"prompt": f"{prompt} =", "answer": answer})
    return found


def reward(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    return [1.0 if text.strip() == right else -1.0 for text, right in zip(completions, answer, strict=True)]


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "</s>", "<unk>", "=", *map(str, range(NUMBERS))]
    made = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


class Until(TrainerCallback):
    """Stops a trainer after so many seconds of processor time."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.end = time.process_time() + self.seconds

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop |= time.process_time() > self.end


class Job:
    """One number of labelled rows, and one seed."""

    def __init__(self, cell: Cell, context: Context) -> None:
        self.cell, self.context, self.options, self.seed = cell, context, context.settings, cell["seed"]
        self.tokenizer = tokenizer()
        evaluation = rows(random.Random(0), self.options["eval_rows"])
        kept = {row["prompt"] for row in evaluation}
        train = [row for row in rows(random.Random(self.seed), 12_000) if row["prompt"] not in kept]
        self.evaluation = evaluation
        self.labelled, self.unlabelled = train[: cell["labelled"]], train[cell["labelled"] :]
        work = Path(self.options["work"] or context.folder / "work")
        self.folder = work / f"{cell['labelled']}-{self.seed}"

    def started(self) -> Any:
        """The start with a new LoRA, without which it is the reference policy."""
        if not self.folder.exists():
            self.start()
        model = LlamaForCausalLM.from_pretrained(self.folder)
        set_seed(self.seed)
        return get_peft_model(model, LoraConfig(**self.options["lora"]))

    # The arms

    def start(self) -> dict[str, Any]:
        set_seed(self.seed)
        pad, eos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        ends = {"pad_token_id": pad, "eos_token_id": eos, "bos_token_id": eos}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(self.tokenizer), **ends, **self.options["model"]))
        began = time.process_time()
        passes = iter(range(self.options["start_steps"]))
        steps = self.fitted(model, self.labelled, passes, self.options["start_batch"], self.options["start_rate"])
        seconds = time.process_time() - began
        model.save_pretrained(self.folder)
        return {"train_s": seconds, "steps": steps, **self.evaluated(model)}

    def again(self) -> dict[str, Any]:
        return self.supervised(self.labelled)

    def further(self) -> dict[str, Any]:
        return self.supervised(self.unlabelled)

    def supervised(self, known: list[Row]) -> dict[str, Any]:
        model, limit, began = self.started(), self.seconds_of_ppo(), time.process_time()
        passes = iter(lambda: time.process_time() - began < limit, False)
        steps = self.fitted(model, known, passes, self.options["batch"], self.cell["rate"])
        return {"train_s": time.process_time() - began, "steps": steps, **self.evaluated(model)}

    def ppo(self) -> dict[str, Any]:
        passes = {"num_mini_batches": self.options["mini_batches"], "num_ppo_epochs": self.options["epochs"]}
        steps = self.options["rollouts"] * self.options["mini_batches"] * self.options["epochs"]
        return self.rewarded(PPOTrainer, PPOConfig, [], max_steps=steps, kl_coef=self.options["kl_coef"], **passes)

    def grpo(self) -> dict[str, Any]:
        return self.grouped(GRPOTrainer, GRPOConfig)

    def rloo(self) -> dict[str, Any]:
        return self.grouped(RLOOTrainer, RLOOConfig)

    def grouped(self, trainer: type, config: type) -> dict[str, Any]:
        """With rollouts as large, and gone through as often, as PPO's."""
        passes = {"steps_per_generation": self.options["mini_batches"], "num_iterations": self.options["epochs"]}
        groups = {"num_generations": self.options["generations"], "beta": self.options["kl_coef"]}
        return self.rewarded(trainer, config, [Until(self.seconds_of_ppo())], max_steps=100_000, **passes, **groups)

    # What they share

    def rewarded(self, trainer: type, config: type, callbacks: list[Any], **settings: Any) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as out:
            args = config(
                out,
                per_device_train_batch_size=self.options["batch"],
                max_completion_length=max(LEVELS) + 1,
                temperature=self.options["temperature"],
                learning_rate=self.cell["rate"],
                lr_scheduler_type="constant",
                logging_steps=10 * self.options["mini_batches"] * self.options["epochs"],
                seed=self.seed,
                bf16=False,
                gradient_checkpointing=False,
                use_cpu=True,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=False,
                **settings,
            )
            made = trainer(
                self.started(),
                reward_funcs=reward,
                args=args,
                train_dataset=Dataset.from_list(self.unlabelled),
                processing_class=self.tokenizer,
                callbacks=callbacks,
            )
            began = time.process_time()
            made.train()
            seconds = time.process_time() - began
        names = ("reward", "kl", "entropy")
        logs = [{name: log[name] for name in names if name in log} for log in made.state.log_history]
        steps = made.state.global_step
        return {"train_s": seconds, "steps": steps, "curve": [log for log in logs if log], **self.evaluated(made.model)}

    def seconds_of_ppo(self) -> float:
        """Those of this start's PPO run at its own rate, which is made before the arms that are measured by it."""
        ppo = {"labelled": self.cell["labelled"], "seed": self.seed, "arm": "ppo"}
        found = [row for row in Lines(self.context.folder / "runs.jsonl").read() if ppo.items() <= row.items()]
        if not found:
            raise SystemExit(f"run the arm ppo first: {ppo}")
        return float(found[0]["train_s"])

    def evaluated(self, model: Any) -> dict[str, Any]:
        """The share of greedy answers that are right, over all and by the level."""
        prompts = [row["prompt"] for row in self.evaluation]
        said = generate_answers(model, self.tokenizer, prompts, 300, max(LEVELS) + 1, special=True)
        right = [text.strip() == row["answer"] for text, row in zip(said, self.evaluation, strict=True)]
        by_level = [mean(right[i :: len(LEVELS)]) for i in range(len(LEVELS))]
        return {"score": mean(right), "by_level": by_level}

    def fitted(self, model: Any, known: list[Row], passes: Iterator[Any], size: int, rate: float) -> int:
        """Train on the answers while `passes` has a step; the number of steps."""
        optimizer = adamw(model.parameters(), rate)

        def encoded(row: Row) -> dict[str, Any]:
            prompt, answer = (self.tokenizer(row[name])["input_ids"] for name in ("prompt", "answer"))
            return completed(prompt, [*answer, self.tokenizer.eos_token_id], 2 * max(LEVELS) + 2)

        tokens = [encoded(row) for row in known]

        def batches() -> Iterator[Batch]:
            draw, order = random.Random(self.seed), list[dict[str, Any]]()
            for _ in passes:
                if len(order) < size:
                    order = draw.sample(tokens, len(tokens)) + order
                yield collate([order.pop() for _ in range(min(size, len(order)))], self.tokenizer.pad_token_id)

        def backward(batch: Batch) -> float:
            labels = batch.pop("labels")
            logits = model(**batch, use_cache=False, logits_to_keep=labels.shape[1] + 1).logits
            return descended(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten()))

        model.train()
        return len(fit(optimizer, get_constant_schedule_with_warmup(optimizer, 2), batches(), backward))


def run(cell: Cell, context: Context) -> dict[str, Any]:
    return getattr(Job(cell, context), cell["arm"])()
