"""What `peft-dynamic train` does once its arguments are right, stage by stage, within one budget of time."""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from rich.console import Console
from torch.optim.lr_scheduler import LambdaLR
from transformers import DataCollatorForSeq2Seq, PrinterCallback, Trainer, TrainingArguments, set_seed

from peft_dynamic._extras import how_to_install
from peft_dynamic.cards import write_model_card
from peft_dynamic.cli import _identity
from peft_dynamic.cli._budget import Budget, Pace, Plan, Schedule, plan
from peft_dynamic.cli._check import check_in_stock_peft
from peft_dynamic.cli._data import Example
from peft_dynamic.cli._edge import UserError, has_package
from peft_dynamic.cli._encode import Tokens, encode_and_tell, prompt_text
from peft_dynamic.cli._job import Job
from peft_dynamic.cli._load import autocast, device, fast_dtype, hush_transformers, load_decoder, load_tokenizer
from peft_dynamic.cli._measure import HeldOut, batches, choose, row_losses
from peft_dynamic.cli._report import Findings, agreement, write_report
from peft_dynamic.cli._yaml import write_recipe
from peft_dynamic.export import export_lora
from peft_dynamic.hosts.modes import adapters_disabled
from peft_dynamic.ranks import RankCurve, rank_curve

SAMPLE_TOKENS = 60
# The rows that a cut goes by, as a share of the training's steps, and at most so many batches
CALIBRATED, MOST_CALIBRATED = 0.03, 16
# Of what loading took, until now: starting a second process that loads the same model again
AGAIN = 1.5
# The check may take this much longer than planned before it is given up, in seconds
GRACE = 60


def run(job: Job) -> None:
    """Train, measure each rank, export the recommended one, check it, and leave a report."""
    hush_transformers()
    _Run(job).all()


class _Trainer(Trainer):
    """Trainer with our learning rate schedule. Overrides `create_scheduler`, which knows fixed ends only."""

    schedule: Schedule

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, self.schedule)
        return self.lr_scheduler


class _Run:
    """One run: its job, what it found, and what the stages hand on."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.console = Console()
        self.budget = Budget(job.max_minutes, job.started)
        self.seconds = {"getting ready": self.budget.used()}
        self.quantization: Any = None
        self.identity = _identity.identity(job)  # now: PEFT writes into the config what its settings come to

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.console.rule(f"[bold]{name}", align="left")
        begin = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - begin

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False)

    def all(self) -> None:
        """Every stage."""
        job = self.job
        set_seed(job.seed)
        with self.stage("load"):
            self.load()
        with self.stage("train"):
            self.train()
        with self.stage("measure each rank"):
            self.measure()
        if self.found.choice is not None and self.found.choice.rank is not None:
            with self.stage("export and check"):
                self.export(self.found.choice.rank)
            with self.stage("samples"):
                self.samples(self.found.choice.rank)
        self.finish()

    def load(self) -> None:
        """The tokenizer, the data as tokens, then the model; and run.yaml, before anything else is written."""
        job = self.job
        then = _identity.read(job.output) if job.resume else None
        dtype = getattr(torch, then["dtype"]) if then else fast_dtype()
        self.found = Findings(dtype)
        self.tokenizer = load_tokenizer(job.model)
        self.examples = self.encoded("--data", job.examples)
        self.held_out = self.encoded("--eval-data", job.held_out)
        if job.unused:
            self.found.notes.append(f"Columns that are not read: {', '.join(job.unused)}.")
        if job.four_bit:
            self.quantization = job.config.quantization_config(compute_dtype=dtype)
        settings = {"quantization_config": self.quantization} if self.quantization else {}
        base = load_decoder(job.model, dtype, settings)
        try:
            self.model = get_peft_model(base, job.config)
        except ValueError as error:
            raise UserError(f"--target-modules or --4bit do not fit {job.model}: {error}") from error
        trained, every = self.model.get_nb_trainable_parameters()
        self.say(f"{trained:,} of {every:,} parameters are trained ({100 * trained / every:.3g} %)")
        self.say(
            f"{len(self.examples)} examples to train on, {len(self.held_out)} held out; ranks {job.config.ranks}; "
            f"{str(dtype).removeprefix('torch.')} on {device(self.model)}"
        )
        for note in self.found.notes:
            self.say(note)
        self.identify(then)

    def encoded(self, option: str, examples: Sequence[Example]) -> list[Tokens]:
        """The examples as tokens, with a note of what is left out."""
        rows, notes = encode_and_tell(examples, self.tokenizer, self.job.max_length, option)
        self.found.notes += notes
        return rows

    def identify(self, then: dict[str, Any] | None) -> None:
        """Write run.yaml, or, in a run that goes on, say which versions are others now."""
        job = self.job
        now = _identity.versions()
        if then is not None:
            if changed := _identity.differences(then["versions"], now):
                self.found.notes.append(f"Gone on with other versions: {'; '.join(changed)}.")
                self.say(self.found.notes[-1])
            return
        _identity.clear(job.output)
        other = {
            "tolerance": job.tolerance,
            "max_minutes": job.max_minutes if job.max_minutes != math.inf else None,
            "save_steps": job.save_steps,
        }
        content = {"run": self.identity, "dtype": str(self.found.dtype).removeprefix("torch.")}
        _identity.write(job.output, {**content, "other": other, "versions": now})

    def train(self) -> None:
        """As many steps as are wanted, or as there is time for; the adapter of the last one is kept."""
        job = self.job
        checkpoint = self.checkpoint()
        done = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
        wanted = job.steps if job.steps > 0 else math.ceil(len(self.examples) / job.batch_size * job.epochs)
        self.found.wanted_steps = wanted
        self.held_batches = batches(self.held_out, self.tokenizer, job.batch_size, job.seed)
        self.reserve = AGAIN * self.budget.used() if self.budget.limited else 0.0
        fits = self.fitting(wanted, done)
        if fits.steps < wanted or fits.rows < len(self.held_out):
            self.say(
                f"--max-minutes leaves time for {fits.steps} of {wanted} steps and {fits.rows} of "
                f"{len(self.held_out)} held-out examples."
            )
        self.held_batches = self.held_batches[: math.ceil(fits.rows / job.batch_size)]
        dtype = str(self.found.dtype).removeprefix("torch.")
        write_recipe(job, self.examples, fits.steps, dtype, not torch.cuda.is_available())
        schedule = Schedule(fits.steps)
        trainer = _Trainer(
            model=self.model,
            args=self.arguments(fits.steps),
            train_dataset=self.examples,
            data_collator=DataCollatorForSeq2Seq(self.tokenizer, padding=True, label_pad_token_id=-100),
            callbacks=[Pace(schedule, fits.train_by, self.budget.clock, lambda: bool(job.interruption), self.say)],
        )
        trainer.schedule = schedule
        trainer.remove_callback(PrinterCallback)  # Pace says how it goes
        with job.interruption.gently():
            trained = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        self.found.steps = trained.global_step
        if trained.global_step < wanted:
            self.say(f"Ended after step {trained.global_step} of {wanted}: --max-minutes.")
        # Trainer leaves the forward pass under its own autocast; from here on precision is chosen where it matters
        self.model = trainer.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        if job.config.truncation == "svd":
            self.calibrate()
        adapter = job.output / "adapter"
        self.model.save_pretrained(str(adapter))
        self.tokenizer.save_pretrained(str(adapter))
        (adapter / "README.md").unlink(missing_ok=True)  # PEFT's form with nothing filled in
        write_model_card(adapter)

    def calibrate(self) -> None:
        """Cut the ranks by what the adapter sees of training rows, as many as a few of its steps had."""
        job = self.job
        some = batches(self.examples, self.tokenizer, job.batch_size, job.seed)
        some = some[: min(MOST_CALIBRATED, max(1, round(CALIBRATED * self.found.steps)))]
        place = device(self.model)
        try:
            with autocast(self.model, self.found.dtype):
                moments = self.model.calibrate([{key: value.to(place) for key, value in b.items()} for b in some])
        except ValueError as error:  # of layers that cannot be measured; the plain cut is there
            self.found.notes.append(f"The ranks are cut by the weights alone: {error}")
            self.say(self.found.notes[-1])
            return
        self.say(f"The ranks are cut by what {moments.tokens:,} tokens of --data say of the loss.")

    def checkpoint(self) -> Path | None:
        """The last checkpoint that is whole, if the run goes on from one."""
        if not self.job.resume:
            return None
        problems = []
        for path in _identity.checkpoints(self.job.output):
            problem = _identity.fault(path)
            if problem is None:
                self.say(f"Going on from {path.name}.")
                return path
            problems.append(f"{path.name} is not whole ({problem}).")
            self.say(problems[-1])
        raise UserError(f"--resume: no checkpoint can be gone on from. {' '.join(problems)} Start with --overwrite.")

    def arguments(self, steps: int) -> TrainingArguments:
        """Trainer's settings."""
        job = self.job
        return TrainingArguments(
            output_dir=str(job.output / "checkpoints"),
            max_steps=steps,
            per_device_train_batch_size=job.batch_size,
            learning_rate=job.learning_rate,
            logging_steps=max(1, steps // 10),
            save_strategy="no" if job.save_steps == 0 else "steps",
            save_steps=job.save_steps or max(1, steps // 5),
            save_total_limit=2 if job.save_steps is None else None,
            bf16=self.found.dtype == torch.bfloat16,
            use_cpu=not torch.cuda.is_available(),
            seed=job.seed,
            report_to="none",
            disable_tqdm=True,
            log_level="error",
            dataloader_pin_memory=torch.cuda.is_available(),
            label_names=["labels"],
        )

    def fitting(self, steps: int, done: int) -> Plan:
        """What fits into the time that is left, by the time of a step and of a held-out row."""
        if not self.budget.limited:
            return Plan(steps, len(self.held_out))
        step, row = (1 + CALIBRATED) * self.time_a_step(), self.time_a_row()
        levels = len(self.job.config.ranks) + 1
        return plan(self.budget, step, row, levels, steps, len(self.held_out), self.reserve, done)

    def time_a_step(self) -> float:
        """Seconds of the forward and backward pass of a batch; nothing of it stays."""
        size = self.job.batch_size
        some = batches(self.examples[: 8 * size], self.tokenizer, size, self.job.seed)[:3]
        self.model.train()
        times = []
        with torch.random.fork_rng():
            for batch in [some[0], *some]:  # the first one sets things up
                begin = self.budget.clock()
                with autocast(self.model, self.found.dtype):
                    loss = self.model(**{key: value.to(device(self.model)) for key, value in batch.items()}).loss
                loss.backward()
                self.model.zero_grad(set_to_none=True)
                times.append(self.budget.clock() - begin)
        return max(1e-9, sum(times[1:]) / len(some))

    def time_a_row(self) -> float:
        """Seconds of a held-out row at the largest rank."""
        batch = self.held_batches[0]
        self.model.eval()
        begin = self.budget.clock()
        row_losses(self.model, batch, self.found.dtype)
        self.model.train()
        return max(1e-9, (self.budget.clock() - begin) / len(batch["labels"]))

    def measure(self) -> None:
        """The loss at each rank; curve.json and the picture are written anew after each of them."""
        job = self.job
        held_out = HeldOut(self.held_batches, list(job.config.ranks), self.budget, self.reserve, self.found.dtype)
        if not (pictures := has_package("matplotlib")):
            note = f"There is no picture: it needs matplotlib. {how_to_install('plot', 'matplotlib')}"
            self.found.notes.append(note)
            self.say(note)

        def write(_: RankCurve) -> None:
            curve = held_out.curve()
            curve.to_json(job.output / "curve.json")
            if pictures and curve.ranks:
                for suffix in ("png", "svg"):
                    curve.plot(job.output / f"curve.{suffix}", title=f"{Path(job.model).name}: one run, each rank")
            # no loss yet: where time runs short, those of earlier ranks are over more examples
            name = "base model" if None in held_out.seen else f"rank {curve.ranks[-1]}"
            self.say(f"{name}: measured; {held_out.rows} examples seen at all so far")

        rank_curve(self.model, held_out, progress=False, on_row=write)
        if held_out.rows < len(self.held_out):
            self.found.notes.append(
                f"--eval-data: {held_out.rows} of {len(self.held_out)} rows measured, for want of time."
            )
        self.found.held_out, self.found.pictures = held_out, pictures
        self.found.choice = choose(held_out, job.tolerance)
        self.console.print(held_out.curve().table(), end="", highlight=False)
        self.say(self.found.choice.sentence)

    def export(self, rank: int) -> None:
        """The recommended rank as a stock LoRA adapter, and what stock PEFT makes of it."""
        job = self.job
        self.model.set_rank(rank)
        lora = export_lora(self.model, job.output / "lora", rank=rank)
        seconds = max(self.reserve, self.budget.left()) + GRACE if self.budget.limited else None
        self.found.check = check_in_stock_peft(
            job.model,
            lora,
            job.output / "adapter",
            self.model,
            self.held_batches[0],
            self.found.dtype,
            self.quantization,
            seconds,
        )
        self.say(agreement(self.found.check))

    def samples(self, rank: int) -> None:
        """For two examples: what is given, and the answers of the base model and of the adapter."""
        self.model.eval()
        for example in self.job.held_out[:2]:
            if self.budget.left() <= 0:
                self.found.notes.append("Fewer samples than two, for want of time.")
                return
            # of plain text, the first words
            prompt = prompt_text(example, self.tokenizer) or " ".join(example.learnt.split()[:8])
            with adapters_disabled(self.model):
                before = self.answer(prompt)
            shown = example.given[-1]["content"] if example.given else prompt
            answers = {"base model": before, f"rank {rank}": self.answer(prompt), "reference": example.learnt}
            self.found.samples.append((shown, answers))
            self.console.print(shown, style="bold", highlight=False, markup=False)
            for who, answer in answers.items():
                self.say(f"  {who}: {answer}")

    def answer(self, prompt: str) -> str:
        """What the model says to a prompt, greedily."""
        limit = {"max_time": max(1.0, self.budget.left())} if self.budget.limited else {}
        inputs = self.tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(device(self.model))
        with torch.no_grad(), autocast(self.model, self.found.dtype):
            ids = self.model.generate(
                **inputs,
                max_new_tokens=SAMPLE_TOKENS,
                do_sample=False,
                pad_token_id=self.tokenizer.pad_token_id,
                **limit,
            )
        text: str = self.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return text.strip()

    def finish(self) -> None:
        """The report, and where everything is."""
        job, choice = self.job, self.found.choice
        assert choice is not None
        unseen = len(self.examples) - self.found.steps * job.batch_size
        if unseen > 0:
            self.found.notes.insert(0, f"--data: {unseen} of {len(self.examples)} rows: fewer steps than one pass has.")
        self.seconds["in all"] = self.budget.used()
        self.found.seconds = self.seconds
        write_report(job, self.found)
        if not job.save_steps:  # kept for a run that is stopped
            shutil.rmtree(job.output / "checkpoints", ignore_errors=True)
        self.console.rule("[bold]done", align="left")
        self.say(f"In {self.seconds['in all']:.0f} s. Look at:")
        files = {"report.md": "all of this, to read"}
        files["curve.png" if self.found.pictures else "curve.json"] = "the curve; also curve.svg, curve.json"
        files["adapter"] = "the adapter at every rank; needs `import peft_dynamic`"
        if choice.rank is not None:
            files["lora"] = f"rank {choice.rank} as a stock LoRA adapter; needs PEFT alone"
        for name, what in files.items():
            self.console.print(f"  {job.output / name}  {what}", highlight=False, markup=False, soft_wrap=True)
