"""`peft-dynamic chat`: talk to an adapter in the terminal, at any rank and depth, beside the base model."""

from __future__ import annotations

import math
from typing import Annotated

import typer

from peft_dynamic.cli._given import FOUR_BIT, INSTRUCTION, MODEL, check_model, ranks_of, require
from peft_dynamic.cli._subject import adapter_folder, read_config
from peft_dynamic.cli._task import require_causal

RUN = Annotated[str, typer.Argument(help="A folder of peft-dynamic train, a saved adapter, or a name on the Hub.")]
RANK = Annotated[int | None, typer.Option(help="The rank to begin with. Default: the largest.", show_default=False)]
TOKENS = Annotated[int, typer.Option(help="The most tokens of an answer.")]
SYSTEM = Annotated[str | None, typer.Option(help="What the chat template's system message says.", show_default=False)]
TEMPERATURE = Annotated[float, typer.Option(help="Of the sampling; 0 takes the likeliest token each time.")]


def chat(
    out: RUN,
    model: MODEL = None,
    rank: RANK = None,
    compare: Annotated[
        str | None, typer.Option(help="Several ranks side by side, as 2,8,32; 0 is the base model.", show_default=False)
    ] = None,
    max_new_tokens: TOKENS = 256,
    temperature: TEMPERATURE = 0.0,
    system: SYSTEM = None,
    instruction: INSTRUCTION = None,
    four_bit: FOUR_BIT = False,
) -> None:
    """Talk to a LoRA or DyLoRA adapter: /rank 4, /depth 15, /base, /compare 2,8, /reset, /help.

    For example: peft-dynamic chat peft-dynamic-out --rank 8

    Ctrl-C stops an answer, and twice ends the chat. Of a pipe each line is a prompt.
    """
    check_talk(max_new_tokens, temperature)
    require(rank is None or compare is None, "--compare", compare, "alone, without --rank")
    require(rank is None or rank >= 1, "--rank", rank, "at least 1")
    columns = None if compare is None else ranks_of(compare, "--compare")
    adapter = adapter_of(out)
    folder = adapter_folder(adapter)
    require_causal(read_config(folder), adapter)
    if model is not None:
        check_model(model)
    from peft_dynamic.cli._chat import Chat
    from peft_dynamic.cli._subject import subject
    from peft_dynamic.cli._talk import Limits, load_talker

    found = subject(adapter, folder, model, four_bit)
    if columns is None:
        columns = [found.largest if rank is None else rank]
    option = "--rank" if compare is None else "--compare"
    for each in columns:
        require(each is None or each <= found.largest, option, each, f"at most {found.largest}, the largest rank")
    Chat(load_talker(found), columns, Limits(max_new_tokens, temperature), system, instruction).run()


def check_talk(max_new_tokens: int, temperature: float) -> None:
    """Stop unless an answer can be made so."""
    require(max_new_tokens >= 1, "--max-new-tokens", max_new_tokens, "at least 1")
    require(0 <= temperature < math.inf, "--temperature", temperature, "at least 0")


def adapter_of(out: str) -> str:
    """The adapter that OUT stands for: `adapter` in it, where it is the folder of a run."""
    from pathlib import Path

    folder = Path(out).expanduser()
    is_run = (folder / "adapter" / "adapter_config.json").is_file() and not (folder / "adapter_config.json").is_file()
    return str(folder / "adapter") if is_run else out
