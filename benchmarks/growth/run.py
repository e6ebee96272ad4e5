"""Time and memory over one size at a time, everything else fixed, with the exponent of a power law.

Seconds are those in which the process had a processor, the median of rounds in which the sizes take turns. The exponent
is the slope of log seconds over log size from the middle size on, where the fixed part weighs less.
"""

import contextlib
import io
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from benchmarks import timing
from benchmarks.pictures import panels, save, style
from benchmarks.study import Cell, Context
from benchmarks.summary import table
from peft_dynamic import DyLoRAConfig, adapter_moments, resize_adapter
from peft_dynamic.functional.exit_loss import exit_losses

SIZES = {
    "dylora r": [8, 16, 32, 64, 128, 256],
    "dylora layers": [2, 4, 8, 16],
    "dylora ranks": [1, 2, 4, 8, 16],
    "dylora experts": [2, 4, 8, 16],
    "moments modules": [14, 28, 56, 112],
    "resize modules": [14, 28, 56, 112],
    "soft exits": [1, 2, 4, 8],
    "soft vocabulary": [4096, 8192, 16384, 32768, 65536],
    "ppo completion": [8, 16, 32, 64],
}
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4}
VOCABULARY = 512


def llama(layers: int = 4) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=layers, **WIDE))


def ids(rows: int = 4, length: int = 64) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


def dylora(what: str, size: int) -> Callable[[], None]:
    """A training step at a drawn rank; the bases are made anew in each."""
    r = size if what == "dylora r" else 32
    ranks = [max(1, round(r * (i + 1) / size)) for i in range(size)] if what == "dylora ranks" else [r // 2, r]
    targets: dict[str, Any] = {"target_modules": "all-linear"}
    if what == "dylora experts":
        sizes = WIDE | {"intermediate_size": 128}
        torch.manual_seed(0)
        base: Any = MixtralForCausalLM(
            MixtralConfig(vocab_size=VOCABULARY, num_hidden_layers=2, num_local_experts=size, **sizes)
        )
        targets, r, ranks = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}, 8, [4, 8]
    else:
        base = llama(size if what == "dylora layers" else 4)
    config = DyLoRAConfig(r=r, ranks=sorted({*ranks}), rank_sampling="uniform", task_type="CAUSAL_LM", **targets)
    model, optimizer = timing.with_optimizer(get_peft_model(base, config))
    return lambda: timing.step(model, optimizer, ids())


def lora_model(modules: int) -> Any:
    model = get_peft_model(llama(modules // 7), LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return model


def moments(modules: int) -> Callable[[], Any]:
    model, batch = lora_model(modules), {"input_ids": ids(), "labels": ids()}
    return lambda: adapter_moments(model, [batch])


def resized(modules: int) -> Callable[[], None]:
    folder = tempfile.mkdtemp()
    lora_model(modules).save_pretrained(folder)

    def call() -> None:
        with tempfile.TemporaryDirectory() as out:
            resize_adapter(folder, f"{out}/small", rank=4)

    return call


def soft(exits: int = 4, vocabulary: int = 8192) -> Callable[[], None]:
    """The losses of the exits of 256 labelled tokens, and the gradients of the states."""
    made = torch.Generator().manual_seed(0)
    hidden = torch.randn(exits, 256, 256, generator=made).requires_grad_()
    labels = torch.randint(0, vocabulary, (256,), generator=made)
    weight = torch.randn(vocabulary, 256, generator=made)
    return lambda: exit_losses(hidden, labels, weight).loss.backward()


def ppo(length: int) -> Callable[[], Any]:
    """A rollout of 8 completions of this length with two epochs of updates, on prompts of 8 tokens."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from peft_dynamic.trainers import PPOConfig, PPOTrainer

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    from tokenizers.pre_tokenizers import Whitespace

    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w1")
    rows = Dataset.from_list([{"prompt": " ".join(f"w{(7 * i + j) % 500 + 2}" for j in range(8))} for i in range(8)])
    model = llama()

    def call() -> None:
        args = PPOConfig(
            tempfile.mkdtemp(),
            per_device_train_batch_size=8,
            num_ppo_epochs=2,
            max_steps=2,
            max_completion_length=length,
            stop_token=None,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            learning_rate=0.0,
            bf16=False,
        )
        adapter = None if hasattr(model, "peft_config") else LoraConfig(r=8, target_modules="all-linear")
        trainer = PPOTrainer(
            model, lambda completions, **_: [0.0] * len(completions), args, rows, None, tokenizer, peft_config=adapter
        )
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.train()
        trainer.model.unload()

    return call


def call_for(what: str, size: int) -> Callable[[], Any]:
    if what.startswith("dylora"):
        return dylora(what, size)
    makers: dict[str, Callable[[int], Callable[[], Any]]] = {
        "moments modules": moments,
        "resize modules": resized,
        "soft exits": lambda exits: soft(exits=exits),
        "soft vocabulary": lambda vocabulary: soft(vocabulary=vocabulary),
        "ppo completion": ppo,
    }
    return makers[what](size)


def memory(what: str, size: int) -> float:
    """MiB by which a process grows in two calls, once all is made."""
    call = call_for(what, size)
    call()  # what a first call loads
    return timing.peak_memory(call)


def exponent(sizes: list[int], values: list[float]) -> float:
    """The slope of log value over log size, by least squares, from the middle size on."""
    half = len(sizes) // 2
    x, y = ([math.log(v) for v in each[half - 1 :]] for each in (sizes, values))
    mean_x, mean_y = statistics.mean(x), statistics.mean(y)
    above = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return above / sum((a - mean_x) ** 2 for a in x)


def run(cell: Cell, context: Context) -> dict[str, Any]:
    what = cell["what"]
    sizes = SIZES[what][: context.settings["largest"]]
    calls = {str(size): call_for(what, size) for size in sizes}
    times = timing.in_turn(calls, context.settings["rounds"], time.process_time)
    found = {
        "sizes": sizes,
        "seconds": [statistics.median(times[str(size)]) for size in sizes],
        "quartiles": [statistics.quantiles(times[str(size)], n=4) for size in sizes],
    }
    if what in ("dylora r", "dylora layers"):
        found["mib"] = [timing.in_own_process(memory, what, size) for size in sizes]
    return {what: found}


def gpu_arithmetic() -> list[list[str]]:
    """Bytes of a 70B Llama with a LoRA of rank 64 on all linear layers, by shapes alone."""
    hidden, kv, between, layers, vocabulary, r = 8192, 1024, 28672, 80, 128256, 64
    shapes = [(hidden, hidden), (hidden, kv), (hidden, kv), (hidden, hidden)]
    shapes += [(hidden, between), (hidden, between), (between, hidden)]
    base = layers * sum(a * b for a, b in shapes) + 2 * vocabulary * hidden
    adapter = layers * sum(r * (a + b) for a, b in shapes)
    lines = []
    for gpus in (8, 64):
        # bfloat16 base; float32 factors, gradients, and two moments
        whole, trained = 2 * base, 16 * adapter
        block = 2 * sum(a * b for a, b in shapes)
        for engine, held, gathered in (
            ("DDP", whole + trained, 0),
            ("ZeRO-2", whole + 4 * adapter + 12 * adapter / gpus, 0),
            ("FSDP2, ZeRO-3", (whole + trained) / gpus + 2 * block, 2 * whole + 2 * 4 * adapter),
        ):
            # a ring sends (n - 1) / n of what is gathered or reduced, and an all-reduce twice that
            moved = (gathered + 4 * adapter * (1 if gathered else 2)) * (gpus - 1) / gpus
            lines.append([engine, str(gpus), f"{held / 2**30:.1f}", f"{moved / 2**30:.1f}"])
    return lines


def report(record: dict[str, Any], context: Context) -> str:
    lines, by_size, kinds = [], [], [what for what in SIZES if what in record]
    times = [1, 2, 4, 8, 16, 32]  # every size is twice the one before
    figure, (axes,) = panels(1, 8.5, 4.8)
    exponents = {}
    for number, what in enumerate(kinds):
        found = record[what]
        sizes, seconds = found["sizes"], found["seconds"]
        mib = found.get("mib")
        grows = f"{exponent(sizes, mib):.2f}" if mib else ""
        exponents[what] = exponent(sizes, seconds)
        lines.append([what, sizes[0], sizes[-1], f"{exponents[what]:.2f}", grows])
        by_size.append([what, *(f"{second:.3g}" for second in seconds), *[""] * (len(times) - len(seconds))])
        label = f"{what}, exponent {exponents[what]:.2f}"
        axes.plot([size / sizes[0] for size in sizes], [s / seconds[0] for s in seconds], label=label, **style(number))
    axes.plot([1, 32], [1, 32], color="0.5", linewidth=1, linestyle=":", label="in proportion")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(times, times)
    axes.set_yticks(times, times)
    axes.set(xlabel="size, times the smallest", ylabel="time, times that of the smallest size")
    axes.legend(fontsize=9, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    finding = (
        f"No method grows much faster than its size: the largest exponent of time is {max(exponents.values()):.2f}"
    )
    save(figure, context.folder / "growth.png", finding)
    grown = table(["what grows", "from", "to", "exponent of time", "of memory"], lines, right=range(1, 5))
    seconds_by_size = table(["seconds at, times the smallest size", *times], by_size, right=range(1, 7))
    by_engine = table(["engine", "GPUs", "GiB a GPU", "GiB a GPU sends in a step"], gpu_arithmetic())
    return (
        f"{grown}\n\n{seconds_by_size}\n\n![Time over size, in logarithms](growth.png)\n\n## A 70B model\n\n{by_engine}"
    )
