"""`peft-dynamic app`: a page in the browser to try an adapter's ranks and depths on.

Notable: the file cannot be called app.py, since `peft_dynamic.cli.app` is the command itself.
"""

from __future__ import annotations

from typing import Annotated

import typer

from peft_dynamic.cli._edge import require_package
from peft_dynamic.cli._given import FOUR_BIT, INSTRUCTION, MODEL, check_model, require
from peft_dynamic.cli._subject import adapter_folder, read_config
from peft_dynamic.cli._task import require_causal
from peft_dynamic.cli.chat import RUN, SYSTEM, TEMPERATURE, TOKENS, adapter_of, check_talk


def app(
    out: RUN,
    model: MODEL = None,
    host: Annotated[str, typer.Option(help="Where it listens. 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port of the page.")] = 7860,
    max_new_tokens: TOKENS = 256,
    temperature: TEMPERATURE = 0.0,
    system: SYSTEM = None,
    instruction: INSTRUCTION = None,
    four_bit: FOUR_BIT = False,
) -> None:
    """Serve a page with a slider for the rank and one for the depth, the base model beside them, and the curve.

    For example: peft-dynamic app peft-dynamic-out --port 8000

    The page works without a network and sends nothing anywhere. Ctrl-C ends it.
    """
    check_talk(max_new_tokens, temperature)
    require(1 <= port <= 65535, "--port", port, "from 1 to 65535")
    adapter = adapter_of(out)
    folder = adapter_folder(adapter)
    require_causal(read_config(folder), adapter)
    if model is not None:
        check_model(model)
    require_package("gradio", "peft-dynamic app", "app")
    from peft_dynamic.cli._page import Page, serve
    from peft_dynamic.cli._subject import subject
    from peft_dynamic.cli._talk import Limits, load_talker

    found = subject(adapter, folder, model, four_bit)
    talker = load_talker(found)
    page = Page(talker, out, folder, Limits(max_new_tokens, temperature), system, instruction)
    serve(page, host, port)
