"""Time and memory of a rollout with its update, beside the PPOTrainer of TRL 1.12.0, the last release that had one.

The part "floor" measures ours beside what nothing can do without, in one process and in turns: the same generation, and
as many SFT steps on the same tokens as there are PPO epochs.

Both train the same policy with the same LoRA on prompts of 32 tokens, completions of exactly 48 and 4 PPO epochs over
batches of 8. TRL's needs a model for the rewards and one for the values; ours is measured with a function and its
value head, and with the same two models. Each variant is a process of its own, and they take turns, one rollout at a
time. Seconds are CPU seconds of the process. Memory is what the process grows by from the start of training.
"""

import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.study import Cell, Context

PROMPT, RESPONSE, BATCH, EPOCHS, VOCABULARY = 32, 48, 8, 4, 49152
VARIANTS = {
    "trl": "trl 1.12.0",
    "ours": "ours",
    "models": "ours, reward and value models",
    "no-kl": "ours, without KL",
    "twice": "ours, old log-probabilities in a pass of their own",
    # the same optimizer steps, each in two halves
    "trl-halves": "trl 1.12.0, 4 rows at a time",
    "halves": "ours, 4 rows at a time",
}
WARM_UP = 1
OURS, FLOOR, TIGHT = "ours", "floor", "floor, only completions meet the vocabulary"


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.WordLevel({word(i): i for i in range(VOCABULARY)}, unk_token=word(0)))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token=word(2), pad_token=word(1), padding_side="left")


def word(number: int) -> str:
    """All of one length: a special token that begins another word would be found in it, and split it."""
    return f"w{number:05}"


def policy(model: str | None) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, set_seed

    set_seed(0)
    if model:
        return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return LlamaForCausalLM(shape(LlamaConfig))


def shape(kind: Any, **more: Any) -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4, "num_attention_heads": 4}
    return kind(vocab_size=VOCABULARY, max_position_embeddings=256, pad_token_id=1, eos_token_id=2, **sizes, **more)


def classifier() -> Any:
    """Tiny also where the policy is a real model, so that what is compared is the training of the policy."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    return LlamaForSequenceClassification(shape(LlamaConfig, num_labels=1))


def prompts(number: int) -> list[list[int]]:
    import torch

    return torch.randint(3, VOCABULARY, (number, PROMPT), generator=torch.Generator().manual_seed(0)).tolist()


def turn_taking(rollouts_done: Callable[[Any], int]) -> Any:
    """A callback that waits for a line on stdin before each rollout, and answers with the CPU seconds it took."""
    from transformers import TrainerCallback

    class Turns(TrainerCallback):
        def __init__(self) -> None:
            self.done = 0

        def wait(self) -> None:
            sys.stdin.readline()
            self.start = time.process_time()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if rollouts_done(state) > self.done:
                self.done = rollouts_done(state)
                taken = time.process_time() - self.start
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
                print("TURN", json.dumps({"seconds": taken, "peak": peak}), flush=True)
                self.wait()

    return Turns()


def resident() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def trl_trainer(model: str | None, rollouts: int, ids: list[list[int]], shared: dict[str, Any]) -> Any:
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    config = PPOConfig(
        response_length=RESPONSE,
        total_episodes=BATCH * rollouts,
        num_sample_generations=0,
        gradient_checkpointing=False,
        **shared,
    )
    return PPOTrainer(
        args=config,
        processing_class=tokenizer(),
        model=policy(model),
        ref_model=None,
        reward_model=classifier(),
        value_model=classifier(),
        train_dataset=Dataset.from_dict({"input_ids": ids}),
        eval_dataset=Dataset.from_dict({"input_ids": ids[:BATCH]}),
        peft_config=adapter(),
    )


def our_trainer(variant: str, model: str | None, rollouts: int, ids: list[list[int]], shared: dict[str, Any]) -> Any:
    from datasets import Dataset

    from peft_dynamic.trainers import PPOConfig, PPOTrainer

    models = variant == "models"
    texts = [" ".join(map(word, row)) for row in ids]
    assert tokenizer()(texts)["input_ids"] == ids  # the very prompts that TRL's trainer is given
    config = PPOConfig(
        max_completion_length=RESPONSE,
        stop_token=None,
        max_steps=rollouts * EPOCHS,
        kl_coef=0.0 if variant == "no-kl" else 0.05,
        **shared,
    )
    trainer = PPOTrainer(
        policy(model),
        classifier() if models else lambda completions, **_: [float(len(text) % 7) for text in completions],
        config,
        train_dataset=Dataset.from_dict({"prompt": texts}),
        processing_class=tokenizer(),
        reward_processing_classes=tokenizer() if models else None,
        value_model=classifier() if models else None,
        peft_config=adapter(),
    )
    trainer.shares_first_pass = trainer.shares_first_pass and variant != "twice"
    return trainer


def adapter() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def settings() -> dict[str, Any]:
    """What both trainers are given."""
    return {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": BATCH,
        "num_ppo_epochs": EPOCHS,
        "learning_rate": 1e-4,
        "temperature": 0.7,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1000,
        "dataloader_pin_memory": False,
    }


def trainer_of(variant: str, model: str | None, rollouts: int) -> Any:
    shared, ids = settings(), prompts(BATCH * rollouts)
    if variant.endswith("halves"):
        shared |= {"per_device_train_batch_size": BATCH // 2, "gradient_accumulation_steps": 2}
    if variant.startswith("trl"):
        return trl_trainer(model, rollouts, ids, shared)
    return our_trainer(variant, model, rollouts, ids, shared)


def count(variant: str, model: str | None) -> None:
    """Print the floating-point operations of the matrix products of one rollout with its updates."""
    from torch.utils.flop_counter import FlopCounterMode

    trainer = trainer_of(variant, model, 1)
    with FlopCounterMode(display=False) as counter:
        trainer.train()
    print("TURN", json.dumps({"operations": counter.get_total_flops()}), flush=True)


def work(variant: str, model: str | None, rollouts: int) -> None:
    """Run one variant, a rollout for each line on stdin."""
    trainer = trainer_of(variant, model, rollouts)
    steps = 1 if variant.startswith("trl") else EPOCHS
    turns = turn_taking(lambda state: state.global_step // steps)
    trainer.add_callback(turns)
    print("TURN", json.dumps({"before": resident()}), flush=True)
    turns.wait()
    trainer.train()


def answer(process: Any) -> dict[str, float]:
    for line in process.stdout:
        if line.startswith("TURN "):
            return json.loads(line[5:])
    raise RuntimeError(f"A variant has stopped: {process.args}")


def profile(model: str | None, rollouts: int) -> dict[str, float]:
    """Share of our time by what is done, from the inside: timers around the methods."""
    from peft_dynamic.trainers.ppo import scoring, trainer
    from peft_dynamic.trainers.ppo.completions import Generator
    from peft_dynamic.trainers.ppo.rollout import Rollouts

    spent: dict[str, float] = {}

    def timed(owner: Any, method: str, name: str) -> None:
        real = getattr(owner, method)

        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return real(*args, **kwargs)
            finally:
                spent[name] = spent.get(name, 0.0) + time.process_time() - start

        setattr(owner, method, call)

    from accelerate import Accelerator

    timed(Generator, "_generate", "generation")
    timed(Rollouts, "reference", "reference policy")
    timed(Rollouts, "score", "old log-probabilities and values, where they take a pass")
    timed(trainer.PPOTrainer, "compute_loss", "forward of the updates, with d logp / d hidden")
    timed(Accelerator, "backward", "backward of the updates")
    timed(scoring, "token_logprobs", "of all that: the head (vocabulary)")
    sys.stdin = io.StringIO()  # no turns to take
    start = time.process_time()
    work("ours", model, rollouts)
    total = time.process_time() - start
    return {name: seconds / total for name, seconds in spent.items()} | {"total_seconds": total}


def floors(trainer: Any, prompts: list[str]) -> dict[str, Callable[[], None]]:
    """What no trainer can do without, with the trainer's own model: its generation, and SFT steps on the completions.

    Once with the loss that the model computes by itself. And once, tighter, with the head on the completions alone.
    """
    import torch

    from peft_dynamic.functional.token_logprobs import token_logprobs

    model, policy = trainer.model, trainer.policy
    # At a rate of 0, so that a step costs what it costs and changes nothing
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, weight_decay=0.0)

    def steps(loss: Callable[[Any], Any]) -> None:
        done = trainer.rollouts.complete(prompts, True, (0, 0, 0))
        model.train()
        for _ in range(EPOCHS):
            loss(done.ids).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    def whole(ids: Any) -> Any:
        labels = torch.where(torch.arange(ids.shape[1]) < PROMPT, -100, ids)
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss

    def tight(ids: Any) -> Any:
        hidden = policy.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)[0]
        states = hidden[:, PROMPT - 1 : -1].flatten(0, 1)
        return -token_logprobs(states, policy.lm_head.weight, None, ids[:, PROMPT:].flatten()).mean()

    return {FLOOR: lambda: steps(whole), TIGHT: lambda: steps(tight)}


def beside_the_floor(model: str | None, rollouts: int) -> dict[str, list[float]]:
    """CPU seconds of each of our rollouts with its update, and of the floors that were measured right behind it."""
    from transformers import TrainerCallback

    trainer = our_trainer("ours", model, rollouts, prompts(BATCH * rollouts), settings())
    calls = floors(trainer, [row["prompt"] for row in trainer.train_dataset][:BATCH])
    seconds: dict[str, list[float]] = {name: [] for name in (OURS, *calls)}

    class Beside(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.start = time.process_time()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % EPOCHS:
                return
            seconds[OURS].append(time.process_time() - self.start)
            for name, call in calls.items():
                start = time.process_time()
                call()
                seconds[name].append(time.process_time() - start)
            self.start = time.process_time()

    trainer.add_callback(Beside())
    trainer.train()
    return seconds


def over_the_floor(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Ours over each floor of the same turn."""
    found: dict[str, Any] = {OURS: {"cpu_seconds_median": statistics.median(seconds[OURS][WARM_UP:])}}
    for name in (FLOOR, TIGHT):
        each = [mine / least for mine, least in zip(seconds[OURS], seconds[name], strict=True)][WARM_UP:]
        found[name] = {
            "cpu_seconds_median": statistics.median(seconds[name][WARM_UP:]),
            "ours_over_it_median": statistics.median(each),
            "ours_over_it_range": [min(each), max(each)],
        }
    return found


def generation(model: str | None, rounds: int) -> dict[str, Any]:
    """Two things that were left out: merging the adapter to generate, and the log-probabilities that generation has."""
    import torch

    from benchmarks.timing import in_turn, ratios
    from peft_dynamic.trainers.ppo.completions import Draw

    trainer = our_trainer("ours", model, 1, prompts(BATCH), settings())
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)  # or the adapter would be 0, and merging it exact
    texts = list(trainer.train_dataset["prompt"])
    base = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "base_layer" in name}

    def complete() -> Any:
        return trainer.rollouts.complete(texts, True, (0, 0, 0))

    def merged() -> None:
        trainer.model.merge_adapter()
        complete()
        trainer.model.unmerge_adapter()

    found: dict[str, Any] = {"times": ratios(in_turn({"as it is": complete, "merged": merged}, rounds), "as it is")}
    left = max((p - base[name]).abs().max().item() for name, p in trainer.model.named_parameters() if name in base)
    found["base weights differ by, after the rounds with merging"] = left
    draw, sampled = Draw.__call__, []

    def record(self: Any, input_ids: Any, scores: Any) -> Any:
        drawn = draw(self, input_ids, scores)
        logprobs = torch.log_softmax(scores.float() / self.temperature, dim=1)
        sampled.append(logprobs.gather(1, drawn.argmax(1)[:, None])[:, 0])
        return drawn

    Draw.__call__ = record  # type: ignore[method-assign]  # in this process, which ends here
    for dtype in (torch.float32, torch.bfloat16):
        trainer.model.to(dtype)
        trainer.value_function.float()  # as it always is
        sampled.clear()
        done = complete()
        difference = (torch.stack(sampled, dim=1) - trainer.rollouts.score(done)[0]).abs()
        found[f"log-probabilities differ by, {str(dtype)[6:]}"] = {
            "mean": difference.mean().item(),
            "max": difference.max().item(),
        }
    return found


def started(trl: Path, variant: str, *arguments: str) -> Any:
    """A process of this file's, with TRL 1.12.0 where it is the variant."""
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    environment["PYTHONPATH"] = f"{trl}:{root}" if variant.startswith("trl") else root
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([sys.executable, __file__, variant, *arguments], env=environment, text=True, **pipes)


def in_turns(
    trl: Path, model: list[str], rollouts: int, variants: list[str]
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """CPU seconds of each rollout, and the MiB that the process grew by, of each variant."""
    processes, before = {}, {}
    for variant in variants:
        processes[variant] = started(trl, variant, str(rollouts), *model)
        before[variant] = answer(processes[variant])["before"]
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    extra: dict[str, float] = {}
    for _ in range(rollouts):
        for variant, process in processes.items():
            process.stdin.write("\n")
            process.stdin.flush()
            found = answer(process)
            seconds[variant].append(found["seconds"])
            extra[variant] = found["peak"] - before[variant]
    for process in processes.values():
        process.kill()
    return seconds, extra


def run(cell: "Cell", context: "Context") -> dict[str, Any]:
    from benchmarks.timing import in_own_process

    model, rollouts = context.paths.get("model"), context.settings["rollouts"]
    folder = str(model) if model else None
    name = model.name if model else "Llama: hidden 64, 4 layers, vocabulary 49152"
    if cell["part"] == "floor":
        return {name: {"floor": over_the_floor(in_own_process(beside_the_floor, folder, rollouts))}}
    if cell["part"] == "generation":
        return {name: {"generation": in_own_process(generation, folder, rollouts)}}
    if cell["part"] == "profile":
        return {name: {"profile of ours": in_own_process(profile, folder, min(rollouts, 4))}}
    trl, given, chosen = context.paths["trl"], [folder] if folder else [], context.settings["variants"]
    if cell["part"] == "operations":
        counted = {
            VARIANTS[variant]: answer(started(trl, variant, "count", *given)) for variant in ("trl", "ours", "twice")
        }
        return {name: {"operations": counted}}
    seconds, extra = in_turns(trl, given, rollouts, chosen)
    setting = {"prompt": PROMPT, "response": RESPONSE, "batch": BATCH, "epochs": EPOCHS, "rollouts": rollouts - WARM_UP}
    reference = seconds["trl"][WARM_UP:]
    variants = {}
    for variant, taken in seconds.items():
        each = taken[WARM_UP:]
        faster = [t / o for t, o in zip(reference, each, strict=True)]
        variants[VARIANTS[variant]] = {
            "cpu_seconds_median": statistics.median(each),
            "times_faster_median": statistics.median(faster),
            "times_faster_range": [min(faster), max(faster)],
            "extra_memory_mib": extra[variant],
            "memory_ratio": extra[variant] / extra["trl"],
        }
    return {name: {"setting": setting, "variants": variants}}


def report(record: dict[str, Any], context: "Context") -> str:
    from benchmarks.summary import table

    tables = []
    for model, found in record.items():
        lines = []
        for variant, each in found.get("variants", {}).items():
            low, high = each["times_faster_range"]
            faster = f"{each['times_faster_median']:.2f} ({low:.2f} to {high:.2f})"
            memory = [f"{each['extra_memory_mib']:.0f}", f"{each['memory_ratio']:.2f}"]
            lines.append([variant, f"{each['cpu_seconds_median']:.2f}", faster, *memory])
        if lines:
            tables.append(table([model, "CPU s a rollout", "times faster", "extra MiB", "over TRL's"], lines))
        lines = []
        for name, each in found.get("floor", {}).items():
            low, high = each.get("ours_over_it_range", (0, 0))
            over = f"{each['ours_over_it_median']:.2f} ({low:.2f} to {high:.2f})" if high else ""
            lines.append([name, f"{each['cpu_seconds_median']:.2f}", over])
        if lines:
            tables.append(table([f"in one process, {model}", "CPU s a rollout", "ours over it"], lines))
        counted = {name: each["operations"] for name, each in found.get("operations", {}).items()}
        if counted:
            least = min(counted.values())
            lines = [[name, f"{each / 1e12:.3f}", f"{each / least:.2f}"] for name, each in counted.items()]
            tables.append(table([f"matrix products, {model}", "10^12 operations a rollout", "over the fewest"], lines))
        if "generation" in found:
            made = found["generation"]
            merged = made["times"]["merged"]["ratio_median"]
            lines = [["time with a merged adapter over that without", f"{merged:.2f}"]]
            for what, each in made.items():
                if isinstance(each, float):
                    lines.append([what, f"{each:.1e}"])
                elif what != "times":
                    lines += [[f"{what}, {kind}", f"{each[kind]:.1e}"] for kind in ("mean", "max")]
            tables.append(table([f"generation, {model}", "value"], lines))
        if "profile of ours" in found:
            shares = dict(found["profile of ours"])
            seconds = shares.pop("total_seconds")
            lines = [[part, f"{share:.0%}"] for part, share in shares.items()]
            tables.append(table([f"profile of ours, {model}", f"share of {seconds:.2f} s"], lines))
    return "\n\n".join(tables)


if __name__ == "__main__":  # a process of `started`, which may have another TRL
    kind, number, *policy_folder = sys.argv[1:]
    if number == "count":
        count(kind, *policy_folder or [None])
    else:
        work(kind, policy_folder[0] if policy_folder else None, int(number))
