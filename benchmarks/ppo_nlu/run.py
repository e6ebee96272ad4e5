"""PPO against its own start: SmolLM2-135M-Instruct on GLUE and SuperGLUE tasks, each way of asking and training it.

Of each task, on the same evaluation rows:

- majority: the answer that most training rows have, without a model.
- zero, few: the model as it is, and with four examples in the prompt; also read leniently, without the closing tag.
- sft: a LoRA trained on the first rows of a seed's shuffle, with the answers that the reward looks for.
- ppo: from there, on the next rows, whose labels only the reward sees; the reference policy is the SFT model.
- sft-more: also from there, supervised on those same rows, with as many optimizer steps.
- sft-longer: the same for as much processor time as ppo took.
"""

import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, get_linear_schedule_with_warmup, set_seed

from benchmarks.study import Cell, Context, Lines
from benchmarks.tasks import Batch, collate, completed, read
from benchmarks.training import adamw, descended, fit
from peft_dynamic.trainers import PPOConfig, PPOTrainer, nlu_metrics, nlu_parse, nlu_prompt, nlu_reward, nlu_target
from peft_dynamic.trainers.rewards.nlu_eval import generate_answers


class Job:
    """One task and seed, from one supervised start."""

    def __init__(self, cell: Cell, context: Context) -> None:
        self.cell, self.context, self.options = cell, context, context.settings
        self.task, self.seed, self.steps = cell["task"], cell["seed"], cell["sft_steps"]
        self.batch, self.longest = self.options["batch"], self.options["longest"]
        self.folder = context.paths["models"] / "smollm2"
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        rows = read(context.paths["data"] / self.task / "train.jsonl")
        random.Random(self.seed).shuffle(rows)
        rows = [row for row in rows if len(self.tokenizer(nlu_prompt(self.task, row))["input_ids"]) <= self.longest]
        self.train = balanced(rows) if cell["balanced"] else rows
        self.evaluation = read(context.paths["data"] / self.task / "validation.jsonl")[: cell["eval_rows"]]
        self.work = Path(self.options["work"] or context.folder / "work")
        self.adapter = self.work / f"{self.task}-{self.seed}-{self.steps}{'-balanced' if cell['balanced'] else ''}"

    def base(self) -> Any:
        set_seed(self.seed)
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32, attn_implementation="eager")

    def started(self) -> Any:
        """The model with the adapter of the SFT run, to be trained on."""
        if not self.adapter.exists():
            self.start()
        return PeftModel.from_pretrained(self.base(), self.adapter, is_trainable=True)

    def start(self) -> tuple[Any, tuple[float, float]]:
        """Train and keep the adapter; the model, and the seconds that it took."""
        model = get_peft_model(self.base(), LoraConfig(**self.options["lora"]))
        clock = Clock()
        rows = self.train[: self.batch * self.steps]
        self.supervised(model, rows, iter(range(self.steps)), self.options["sft_rate"], self.steps)
        seconds = clock.seconds()
        model.save_pretrained(self.adapter)
        return model, seconds

    def after_sft(self) -> list[dict[str, Any]]:
        """The rows that PPO has its prompts from; the first ones again if a task has too few."""
        rows = self.train[self.batch * self.steps :] + self.train
        return rows[: self.batch * self.options["rollout"] * self.cell["rollouts"]]

    def updates(self) -> int:
        return self.cell["rollouts"] * self.options["rollout"] * self.options["ppo_epochs"]

    def evaluate(self, model: Any, shots: int = 0) -> dict[str, Any]:
        examples = self.train[:shots]
        prompts = [nlu_prompt(self.task, row, shots=examples) for row in self.evaluation]
        with torch.autocast("cpu", torch.bfloat16):
            said = generate_answers(model, self.tokenizer, prompts, 32, 12, special=True)
        answers = [nlu_parse(self.task, text) for text in said]
        lenient = [nlu_parse(self.task, text + "</Judgement>") for text in said]
        return {
            **nlu_metrics(self.task, answers, self.evaluation),
            "lenient": nlu_metrics(self.task, lenient, self.evaluation),
            "answers": [text.strip()[:20] for text in said[:5]],
            "predictions": answers,
        }

    def supervised(
        self, model: Any, rows: list[dict[str, Any]], passes: Iterator[Any], rate: float, decay: int = 10**9
    ) -> int:
        """Train on batches of the rows while `passes` has a step; the number of steps."""
        encoded = [
            completed(
                self.tokenizer(nlu_prompt(self.task, row))["input_ids"],
                self.tokenizer(f"{nlu_target(self.task, row)}{self.tokenizer.eos_token}")["input_ids"],
                self.longest + 16,
            )
            for row in rows
        ]
        optimizer = adamw(model.parameters(), rate)

        def batches() -> Iterator[Batch]:
            draw, order = random.Random(self.seed), []
            for _ in passes:
                if len(order) < self.batch:
                    order = draw.sample(encoded, len(encoded))
                yield collate([order.pop() for _ in range(self.batch)], self.tokenizer.pad_token_id)

        def backward(batch: Batch) -> float:
            labels = batch.pop("labels")
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(**batch, use_cache=False, logits_to_keep=labels.shape[1] + 1).logits
            return descended(cross_entropy(logits[:, :-1].float().flatten(0, 1), labels.flatten()))

        def say(step: int, loss: float) -> None:
            print(f"{loss:.3f}", end=" ", flush=True)

        model.train()
        schedule = get_linear_schedule_with_warmup(optimizer, 2, decay)
        return len(fit(optimizer, schedule, batches(), backward, say=say))

    def majority(self) -> dict[str, Any]:
        answer = Counter(row["label"] for row in self.train).most_common(1)[0][0]
        metrics = nlu_metrics(self.task, [answer] * len(self.evaluation), self.evaluation)
        return {**metrics, "lenient": metrics, "predictions": [answer]}

    def zero(self) -> dict[str, Any]:
        return self.evaluate(self.base())

    def few(self) -> dict[str, Any]:
        return self.evaluate(self.base(), self.options["shots"])

    def sft(self) -> dict[str, Any]:
        model, seconds = self.start()
        return {"train_s": seconds, "steps": self.steps, **self.evaluate(model)}

    def sft_more(self) -> dict[str, Any]:
        return self._continued(iter(range(self.updates())))

    def sft_longer(self) -> dict[str, Any]:
        """For the processor time of this seed's PPO run."""
        ppo = self.cell | {"arm": "ppo"}
        lines = Lines(self.context.folder / "runs.jsonl").read()
        limit = next(line for line in lines if self.context.study.is_line_of(line, ppo))["train_s"]
        clock = Clock()
        return self._continued(iter(lambda: clock.seconds()[1] < limit[1], False))

    def _continued(self, passes: Iterator[Any]) -> dict[str, Any]:
        model, clock = self.started(), Clock()
        steps = self.supervised(model, self.after_sft(), passes, self.cell["more_rate"])
        return {"train_s": clock.seconds(), "steps": steps, **self.evaluate(model)}

    def ppo(self) -> dict[str, Any]:
        model = self.started()
        model.load_adapter(self.adapter, "sft")  # the reference policy
        rows = [{"prompt": nlu_prompt(self.task, row), "label": row["label"]} for row in self.after_sft()]
        with tempfile.TemporaryDirectory() as out:
            trainer = PPOTrainer(
                model,
                nlu_reward(self.task),
                self.ppo_config(out),
                Dataset.from_list(rows),
                processing_class=self.tokenizer,
            )
            clock = Clock()
            trainer.train()
            seconds = clock.seconds()
        curve = [log for log in trainer.state.log_history if "reward" in log]
        return {"train_s": seconds, "steps": self.updates(), "curve": curve, **self.evaluate(model)}

    def ppo_config(self, out: str) -> PPOConfig:
        return PPOConfig(
            out,
            per_device_train_batch_size=self.batch,
            num_mini_batches=self.options["rollout"],
            num_ppo_epochs=self.options["ppo_epochs"],
            max_steps=self.updates(),
            logging_steps=self.options["rollout"] * self.options["ppo_epochs"],
            learning_rate=self.cell["ppo_rate"],
            lr_scheduler_type="constant",
            kl_coef=self.cell["kl_coef"],
            shuffle_dataset=not self.cell["in_order"],  # balanced rows have the classes in turn
            ref_adapter_name="sft",
            max_completion_length=9,
            stop_strings=["</Judgement>"],
            max_grad_norm=1.0,
            seed=self.seed,
            bf16=True,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )


class Clock:
    """Seconds since it was made: of the wall, and of this process's processor time."""

    def __init__(self) -> None:
        self.start = time.perf_counter(), time.process_time()

    def seconds(self) -> tuple[float, float]:
        return time.perf_counter() - self.start[0], time.process_time() - self.start[1]


def balanced(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each class in turn, of stsb each whole number; the rows of rarer ones again."""
    classes: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        classes.setdefault(round(row["label"]), []).append(row)
    longest = max(map(len, classes.values()))
    return [own[i % len(own)] for i in range(longest) for _, own in sorted(classes.items())]


def run(cell: Cell, context: Context) -> dict[str, Any]:
    job, clock = Job(cell, context), Clock()
    found = getattr(job, cell["arm"].replace("-", "_"))()
    return {"total_s": clock.seconds(), **found}
