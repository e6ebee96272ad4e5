"""The page of `peft-dynamic app`: what stands on it, and what it answers.

Notable: nothing of it comes from the network. gradio's own fonts would, its reports of use, and its search for a newer
version, so all three are off. Visitors take turns at the model; the two answers of one visitor are one batch.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import typer

from peft_dynamic.cli._drawing import curve_svg
from peft_dynamic.cli._edge import UserError, reason
from peft_dynamic.cli._talk import Answer, Ask, Limits, Message, Talker
from peft_dynamic.ranks import RankCurve

VISITORS = 40  # who may wait at once


def imported() -> Any:
    """gradio, which an install without the extra lacks; it reads this variable when it is imported."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio

    return gradio


def _refused(why: object) -> Exception:
    """What the visitor sees, and nobody else."""
    error: Exception = imported().Error(" ".join(str(why).split()), print_exception=False)
    return error


def _slider(label: str, most: int, name: str) -> Any:
    """From 1 to `most`, where it stands. Its value is checked where it is used: gradio would print a traceback."""
    made = imported().Slider(1, most, most, step=1, label=label, elem_id=name, buttons=[])
    made.preprocess = lambda payload: payload
    return made


@dataclass
class Page:
    """What the page is about.

    Args:
        talker: the model.
        title: what was asked for: the folder, or the name on the Hub.
        folder: the adapter's, beside or in which a run has its curve.json and report.md.
        limits: how answers are made.
        system: the system message, or None.
        instruction: a line to put before each prompt, or None.
    """

    talker: Talker
    title: str
    folder: Path
    limits: Limits
    system: str | None = None
    instruction: str | None = None

    def __post_init__(self) -> None:
        self.curve = self._curve()
        self.samples = self._samples()

    def _beside(self, name: str) -> Path | None:
        return next((path for at in (self.folder, self.folder.parent) if (path := at / name).is_file()), None)

    def _curve(self) -> RankCurve | None:
        path = self._beside("curve.json")
        try:
            curve = None if path is None else RankCurve.from_json(path)
        except (OSError, ValueError, TypeError, KeyError):
            typer.echo(f"{path} cannot be read, so the page has no curve.", err=True)
            return None
        return curve if curve is not None and curve.metrics and not curve.over_budgets else None

    def _samples(self) -> str:
        """What the run's report has under that name."""
        path = self._beside("report.md")
        text = "" if path is None else path.read_text(encoding="utf-8")
        _, found, rest = text.partition("## Samples\n")
        return rest.partition("\n## ")[0].strip() if found else ""

    # --- what it answers

    def answer(
        self, prompt: str, rank: float, depth: float | None, beside: bool
    ) -> Iterator[tuple[str, str, str, str]]:
        """The adapter's answer as it grows, what it took, and the same of the base model.

        Raises:
            gradio.Error: there is no such rank or depth.
        """
        if not prompt.strip():
            raise _refused("The prompt is empty.")
        asks, limits = self._asked(prompt, rank, depth, beside)
        yield "", "waiting for its turn", "", ""
        try:
            with closing(self.talker.stream(asks, limits)) as stream:
                for answers in stream:
                    yield self._shown(answers)
        except ValueError as error:
            raise _refused(error) from error

    def _asked(self, prompt: str, rank: float, depth: float | None, beside: bool) -> tuple[list[Ask], Limits]:
        messages: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        content = f"{self.instruction}\n{prompt}" if self.instruction else prompt
        messages.append({"role": "user", "content": content})
        try:
            for name, value in (("rank", rank), ("depth", depth)):
                if value is not None and value != int(value):
                    raise ValueError(f"{name} {value}: must be a whole number.")
            self.talker.check_rank(int(rank))
            exit = None if depth is None or int(depth) == self.talker.depth else int(depth)
            if exit is not None:
                self.talker.check_exit(exit)
        except (ValueError, TypeError, OverflowError) as error:
            raise _refused(error) from error
        ranks = [int(rank), *([None] if beside else [])]
        return [Ask(messages, each) for each in ranks], replace(self.limits, exit=exit)

    def _shown(self, answers: list[Answer]) -> tuple[str, str, str, str]:
        first, second = answers[0], answers[1] if len(answers) > 1 else None
        return first.text, first.speed, second.text if second else "", second.speed if second else ""

    def drawn(self, rank: float) -> str:
        """The curve, with the point of a rank marked.

        Raises:
            gradio.Error: there is no such rank.
        """
        try:
            self.talker.check_rank(int(rank))
        except (ValueError, TypeError, OverflowError) as error:
            raise _refused(error) from error
        return "" if self.curve is None else curve_svg(self.curve, self.curve.metrics[0], int(rank))

    # --- what stands on it

    def blocks(self) -> Any:
        """The page for gradio."""
        gradio = imported()
        with gradio.Blocks(title=f"peft-dynamic: {self.title}", analytics_enabled=False) as page:
            gradio.Markdown(f"## {Path(self.title).name}\n\nOne adapter, every rank. Pick one and ask.")
            with gradio.Row():
                rank, layers = _slider("rank", self.talker.largest, "rank"), self.talker.depth
                depth = gradio.State(None) if layers is None else _slider("layers", layers, "depth")
            prompt = gradio.Textbox(label="prompt", lines=3, elem_id="prompt")
            with gradio.Row():
                ask = gradio.Button("Ask", variant="primary", elem_id="ask")
                stop = gradio.Button("Stop", elem_id="stop")
                beside = gradio.Checkbox(True, label="the base model beside it", elem_id="beside")
            shown = []
            with gradio.Row():
                for name in ("adapter", "base model"):
                    with gradio.Column():
                        shown.append(gradio.Textbox(label=name, lines=8, interactive=False, elem_id=name.split()[0]))
                        shown.append(gradio.Markdown(elem_id=f"{name.split()[0]}-speed"))
            if self.curve is not None:
                drawing = gradio.HTML(self.drawn(self.talker.largest), elem_id="curve")
                rank.change(self.drawn, rank, drawing, api_name="curve", show_progress="hidden")
            if self.samples:
                with gradio.Accordion("samples of the run", open=False):
                    gradio.Markdown(self.samples)
            asked = gradio.on(
                [ask.click, prompt.submit],
                self.answer,
                [prompt, rank, depth, beside],
                shown,
                api_name="answer",
                concurrency_limit=VISITORS,
            )
            stop.click(None, cancels=[asked])
        return page.queue(max_size=VISITORS)


def start(page: Page, host: str, port: int) -> Any:
    """Serve a page from threads of its own; its `close()` ends that.

    Raises:
        UserError: it cannot listen there.
    """
    blocks = page.blocks()
    plain = imported().themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    try:
        blocks.launch(
            server_name=host,
            server_port=port,
            share=False,
            inbrowser=False,
            quiet=True,
            show_error=True,
            prevent_thread_lock=True,
            footer_links=[],
            run_history=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            enable_monitoring=False,
            theme=plain,
        )
    except (OSError, ValueError) as error:
        raise UserError(f"--host {host} --port {port}: {reason(error)}. Pass another --port.") from error
    return blocks


def serve(page: Page, host: str, port: int) -> None:
    """Serve it until Ctrl-C."""
    running = start(page, host, port)
    typer.echo(f"Open http://{host}:{port} in a browser. Ctrl-C ends it.")
    try:
        threading.Event().wait()
    finally:
        running.close(verbose=False)
