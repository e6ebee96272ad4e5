"""PPO against its own start: SmolLM2-135M-Instruct on GLUE and SuperGLUE tasks, each way of asking and training it.

    PYTHONPATH=. python benchmarks/ppo_nlu/run.py --data DATA --models MODELS --tasks sst2 cola --seeds 1 2 3

DATA holds <task>/train.jsonl and <task>/validation.jsonl; MODELS holds the folder smollm2. Of each task, on the same
evaluation rows:

- majority: the answer that most training rows have, without a model.
- zero, few: the model as it is, and with four examples in the prompt; also read leniently, without the closing tag.
- sft: a LoRA trained on the first rows of a seed's shuffle, with the answers that the reward looks for.
- ppo: from there, on the next rows, whose labels only the reward sees; the reference policy is the SFT model.
- sft-more: also from there, supervised on those same rows, with as many optimizer steps.
- sft-longer: the same for as much processor time as ppo took.

Each run is one line of runs.jsonl, written when it ends; runs that are there are skipped. report.py makes the table and
the plots.
"""

import argparse
import json
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, get_linear_schedule_with_warmup, set_seed

from benchmarks.tasks import collate, completed, read
from peft_dynamic.trainers import PPOConfig, PPOTrainer, nlu_metrics, nlu_parse, nlu_prompt, nlu_reward, nlu_target
from peft_dynamic.trainers.ppo.nlu_eval import _generate

RUNS = Path(__file__).with_name("runs.jsonl")
BATCH, PPO_EPOCHS = 16, 2
ROLLOUT = 2  # batches
TUNE_SEED = 7  # PPO's learning rate is chosen on it; it is not reported
SFT_RATE, SHOTS, LONGEST = 1e-3, 4, 200  # LONGEST: training rows with longer prompts, in tokens, are left out
# On the upper 15 of 30 layers: the backward pass, the larger part of a step on a CPU, ends there.
LORA = {
    "r": 16,
    "lora_alpha": 64,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "layers_to_transform": list(range(15, 30)),
    "task_type": "CAUSAL_LM",
}


class Study:
    """One task and seed."""

    def __init__(self, arguments: argparse.Namespace, task: str, seed: int) -> None:
        self.task, self.seed, self.arguments = task, seed, arguments
        self.folder = arguments.models / "smollm2"
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        rows = read(arguments.data / task / "train.jsonl")
        random.Random(seed).shuffle(rows)
        rows = [row for row in rows if len(self.tokenizer(nlu_prompt(task, row))["input_ids"]) <= LONGEST]
        self.train = balanced(rows) if arguments.balanced else rows
        self.evaluation = read(arguments.data / task / "validation.jsonl")[: arguments.eval_rows]
        self.steps = arguments.sft_steps
        self.adapter = arguments.work / f"{task}-{seed}-{self.steps}{'-balanced' if arguments.balanced else ''}"

    def base(self) -> Any:
        set_seed(self.seed)
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32, attn_implementation="eager")

    def started(self) -> Any:
        """The model with the adapter of the SFT run, to be trained on."""
        return PeftModel.from_pretrained(self.base(), self.adapter, is_trainable=True)

    def after_sft(self) -> list[dict[str, Any]]:
        """The rows that PPO has its prompts from; the first ones again if a task has too few."""
        rows = self.train[BATCH * self.steps :] + self.train
        return rows[: BATCH * ROLLOUT * self.arguments.rollouts]

    def evaluate(self, model: Any, shots: int = 0) -> dict[str, Any]:
        examples = self.train[:shots]
        prompts = [nlu_prompt(self.task, row, shots=examples) for row in self.evaluation]
        with torch.autocast("cpu", torch.bfloat16):
            said = _generate(model, self.tokenizer, prompts, 32, 12, special=True)
        answers = [nlu_parse(self.task, text) for text in said]
        lenient = [nlu_parse(self.task, text + "</Judgement>") for text in said]
        return {
            **nlu_metrics(self.task, answers, self.evaluation),
            "lenient": nlu_metrics(self.task, lenient, self.evaluation),
            "answers": [text.strip()[:20] for text in said[:5]],
            "predictions": answers,
        }

    def supervised(self, model: Any, rows: list[dict[str, Any]], passes: Iterator[int], decay: int | None) -> int:
        """Train on batches of the rows while `passes` has a step; the number of steps."""
        encoded = [
            completed(
                self.tokenizer(nlu_prompt(self.task, row))["input_ids"],
                self.tokenizer(f"{nlu_target(self.task, row)}{self.tokenizer.eos_token}")["input_ids"],
                LONGEST + 16,
            )
            for row in rows
        ]
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=SFT_RATE if decay else self.arguments.more_rate, weight_decay=0.0)
        schedule = get_linear_schedule_with_warmup(optimizer, 2, decay or 10**9)
        draw, order, steps = random.Random(self.seed), [], 0
        model.train()
        for _ in passes:
            if len(order) < BATCH:
                order = draw.sample(encoded, len(encoded))
            batch = collate([order.pop() for _ in range(BATCH)], self.tokenizer.pad_token_id)
            labels = batch.pop("labels")
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(**batch, use_cache=False, logits_to_keep=labels.shape[1] + 1).logits
            loss = cross_entropy(logits[:, :-1].float().flatten(0, 1), labels.flatten())
            loss.backward()
            print(f"{loss.item():.3f}", end=" ", flush=True)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            steps += 1
        return steps

    def majority(self) -> dict[str, Any]:
        answer = Counter(row["label"] for row in self.train).most_common(1)[0][0]
        metrics = nlu_metrics(self.task, [answer] * len(self.evaluation), self.evaluation)
        return {**metrics, "lenient": metrics, "predictions": [answer]}

    def zero(self) -> dict[str, Any]:
        return self.evaluate(self.base())

    def few(self) -> dict[str, Any]:
        return self.evaluate(self.base(), SHOTS)

    def sft(self) -> dict[str, Any]:
        model = get_peft_model(self.base(), LoraConfig(**LORA))
        clock = Clock()
        self.supervised(model, self.train[: BATCH * self.steps], iter(range(self.steps)), decay=self.steps)
        seconds = clock.seconds()
        model.save_pretrained(self.adapter)
        return {"train_s": seconds, "steps": self.steps, **self.evaluate(model)}

    def sft_more(self) -> dict[str, Any]:
        return self._continued(iter(range(self.arguments.rollouts * ROLLOUT * PPO_EPOCHS)))

    def sft_longer(self) -> dict[str, Any]:
        """For the processor time of this seed's PPO run."""
        limit = done(self.arguments, self.task, self.seed, "ppo")["train_s"]
        clock = Clock()
        return self._continued(iter(lambda: clock.seconds()[1] < limit[1], False))

    def _continued(self, passes: Iterator[Any]) -> dict[str, Any]:
        model, clock = self.started(), Clock()
        steps = self.supervised(model, self.after_sft(), passes, decay=None)
        return {"train_s": clock.seconds(), "steps": steps, **self.evaluate(model)}

    def ppo(self) -> dict[str, Any]:
        model = self.started()
        model.load_adapter(self.adapter, "sft")  # the reference policy
        rows = [{"prompt": nlu_prompt(self.task, row), "label": row["label"]} for row in self.after_sft()]
        settings = PPOConfig(
            str(self.arguments.work / "ppo"),
            per_device_train_batch_size=BATCH,
            num_mini_batches=ROLLOUT,
            num_ppo_epochs=PPO_EPOCHS,
            max_steps=self.arguments.rollouts * ROLLOUT * PPO_EPOCHS,
            logging_steps=ROLLOUT * PPO_EPOCHS,
            learning_rate=self.arguments.ppo_rate,
            lr_scheduler_type="constant",
            kl_coef=self.arguments.kl_coef,
            shuffle_dataset=not self.arguments.in_order,  # balanced rows have the classes in turn
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
        trainer = PPOTrainer(
            model, nlu_reward(self.task), settings, Dataset.from_list(rows), processing_class=self.tokenizer
        )
        clock = Clock()
        trainer.train()
        seconds = clock.seconds()
        curve = [log for log in trainer.state.log_history if "reward" in log]
        return {"train_s": seconds, "steps": settings.max_steps, "curve": curve, **self.evaluate(model)}


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


def named(arguments: argparse.Namespace, task: str, seed: int, arm: str) -> dict[str, Any]:
    way = {"sft_steps": arguments.sft_steps, "balanced": arguments.balanced}
    return {"task": task, "seed": seed, "arm": arm, **way}


def done(arguments: argparse.Namespace, task: str, seed: int, arm: str) -> dict[str, Any] | None:
    runs = read(RUNS) if RUNS.exists() else []
    key = named(arguments, task, seed, arm)
    return next((run for run in runs if key.items() <= ({"balanced": False} | run).items()), None)


def main(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    for seed in arguments.seeds:
        for task in arguments.tasks:
            for arm in arguments.arms:
                if done(arguments, task, seed, arm):
                    continue
                study, clock = Study(arguments, task, seed), Clock()
                found = getattr(study, arm.replace("-", "_"))()
                used = {}
                if arm == "ppo":
                    used = {key: getattr(arguments, key) for key in ("ppo_rate", "kl_coef", "in_order")}
                used |= {"more_rate": arguments.more_rate} if arm in ("sft-more", "sft-longer") else {}
                run = named(arguments, task, seed, arm) | used | {"total_s": clock.seconds()} | found
                with RUNS.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(run) + "\n")
                print(
                    task,
                    seed,
                    arm,
                    f"{run['score']:.3f} unparsable {run['unparsable']:.2f}",
                    run["total_s"],
                    flush=True,
                )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("out/ppo_nlu"), help="where the SFT adapters are kept")
    parser.add_argument("--tasks", nargs="+", default=["sst2", "cola", "stsb", "mrpc", "rte", "cb", "boolq"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--arms", nargs="+", default=["sft", "ppo", "sft-more", "sft-longer"])
    parser.add_argument("--eval-rows", type=int, default=200)
    parser.add_argument("--sft-steps", type=int, default=12)
    parser.add_argument("--balanced", action="store_true", help="equally many training rows of each class")
    parser.add_argument("--rollouts", type=int, default=24, help="of 32 prompts, in PPO")
    parser.add_argument("--ppo-rate", type=float, default=2e-5)
    parser.add_argument("--kl-coef", type=float, default=0.05)
    parser.add_argument("--in-order", action="store_true", help="with --balanced: equally many of each in each rollout")
    parser.add_argument("--more-rate", type=float, default=3e-4)
    main(parser.parse_args())
