"""How other programs read a stock LoRA of the repository: the commands that their own manuals give."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from peft_dynamic.cards.facts import CardFacts, Twin
from peft_dynamic.cards.text import fenced, literal, one_line
from peft_dynamic.cards.usage import NO_BASE, model_class_name

# vLLM reserves memory by these classes of --max-lora-rank
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def elsewhere(config: Mapping[str, Any], base: str | None, source: str, facts: CardFacts) -> list[str]:
    """The parts of the card on vLLM, llama.cpp, Ollama and diffusers, as far as they fit this adapter.

    Args:
        config: of the adapter.
        base: the base model's name on the Hub, where it is known.
        source: the repository.
        facts: with the stock LoRAs in it.
    """
    parts = []
    short = one_line(source.rpartition("/")[2])
    for engine, written in (("vllm", _vllm), ("llama.cpp", _llama_cpp)):
        twin = preferred([twin for twin in facts.twins if engine in twin.engines], facts.recommended)
        if twin is not None and config.get("task_type") == "CAUSAL_LM":
            parts.append(written(base or NO_BASE, source, short, twin))
    twin = preferred(facts.twins, facts.recommended)
    if twin is not None and model_class_name(config)[0].partition(".")[0] == "diffusers":
        parts.append(_diffusers(source, twin))
    return parts


def preferred(twins: list[Twin], rank: int | None) -> Twin | None:
    """The one of this rank, else the largest."""
    return next((twin for twin in twins if twin.rank == rank), max(twins, key=lambda each: each.rank, default=None))


def _fetch(source: str, short: str, twin: Twin) -> str:
    wanted = f"{twin.folder}/*" if twin.folder else "adapter_*"
    return f"hf download {shlex.quote(source)} --include {shlex.quote(wanted)} --local-dir {shlex.quote(short)}"


def _place(short: str, twin: Twin) -> str:
    return shlex.quote(f"{short}/{twin.folder}" if twin.folder else short)


def _vllm(base: str, source: str, short: str, twin: Twin) -> str:
    most = next((rank for rank in VLLM_RANKS if rank >= twin.rank), twin.rank)
    module = shlex.quote(f"{short}={short}/{twin.folder}".rstrip("/"))
    lines = [
        _fetch(source, short, twin),
        f"vllm serve {shlex.quote(base)} --enable-lora --max-lora-rank {most} --lora-modules {module}",
    ]
    return f"### vLLM\n\n{fenced(chr(10).join(lines), 'bash')}"


def _llama_cpp(base: str, source: str, short: str, twin: Twin) -> str:
    name = shlex.quote(f"{short}-rank-{twin.rank}.gguf")
    lines = [
        f"hf download {shlex.quote(base)} --local-dir base",
        _fetch(source, short, twin),
        "python convert_hf_to_gguf.py base --outfile base.gguf",
        f"python convert_lora_to_gguf.py {_place(short, twin)} --base base --outfile {name}",
        f"llama-cli -m base.gguf --lora {name}",
    ]
    modelfile = fenced(f"FROM ./base.gguf\nADAPTER ./{short}-rank-{twin.rank}.gguf")
    return (
        f"### llama.cpp\n\nThe two scripts are in llama.cpp's repository:\n\n{fenced(chr(10).join(lines), 'bash')}\n\n"
        f"### Ollama\n\nA `Modelfile` with these two files, for `ollama create`:\n\n{modelfile}"
    )


def _diffusers(source: str, twin: Twin) -> str:
    place = f", subfolder={literal(twin.folder)}" if twin.folder else ""
    lines = [
        "from peft import PeftModel",
        "",
        "pipeline = ...  # the pipeline of the base model",
        f"pipeline.unet = PeftModel.from_pretrained(pipeline.unet, {literal(source)}{place})",
    ]
    return f"### diffusers\n\n{fenced(chr(10).join(lines), 'python')}"
