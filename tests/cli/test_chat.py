"""`peft-dynamic chat`: what is answered at each rank and depth, the commands, a pipe, and Ctrl-C."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

from peft_dynamic import DyLoRAConfig, MoSLoRAConfig
from peft_dynamic.cli import app
from peft_dynamic.cli._encode import prompt_text
from peft_dynamic.trainers import exit_at
from tests.cli import common
from tests.cli.common import environment, invoke, message
from tests.conformance.cases import perturb

elsewhere, tiny = common.elsewhere, common.tiny  # fixtures

KINDS: dict[str, Any] = {
    "dylora": lambda **more: DyLoRAConfig(r=4, ranks=[1, 2, 4], **more),
    "lora": lambda **more: LoraConfig(r=4, **more),
    "moslora": lambda **more: MoSLoRAConfig(r=4, **more),
}
TARGETS = ["q_proj", "v_proj", "down_proj"]
LENGTH = 12


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft_dynamic.cli._load.fast_dtype", lambda: torch.float32)  # whatever is fast here


def saved(tiny: Path, folder: Path, kind: str = "dylora", targets: Any = TARGETS, **more: Any) -> Path:
    model = AutoModelForCausalLM.from_pretrained(tiny)
    model = get_peft_model(model, KINDS[kind](task_type="CAUSAL_LM", target_modules=targets, **more))
    perturb(model, 1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In the folder of a run."""
    run = tmp_path_factory.mktemp("run")
    saved(tiny, run / "adapter")
    return run


def talk(lines: str, *arguments: object) -> Any:
    words = ["chat", *arguments, "--max-new-tokens", LENGTH]
    return CliRunner().invoke(app, [str(word) for word in words], input=lines)


def loaded(tiny: Path, folder: Path) -> tuple[Any, Any]:
    """The base model, and the adapter on another one."""
    base, other = (AutoModelForCausalLM.from_pretrained(tiny) for _ in range(2))
    return base.eval(), PeftModel.from_pretrained(other, folder).eval()


def said_by(model: Any, tiny: Path, prompt: str, exit: int | None = None) -> str:
    """By transformers' own generate, one prompt at a time."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    ids = tokenizer(prompt, return_tensors="pt")
    with exit_at(model, exit or 2):
        found = model.generate(**ids, max_new_tokens=LENGTH, do_sample=False, pad_token_id=0)
    return tokenizer.decode(found[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def expected(tiny: Path, folder: Path, prompt: str, rank: int | None, exit: int | None = None) -> str:
    """What the base model says, or the adapter at a rank."""
    base, model = loaded(tiny, folder)
    if rank is not None:
        model.set_rank(rank)
    return said_by(base if rank is None else model, tiny, prompt, exit)


def lines_of(result: Any) -> list[str]:
    assert result.exit_code == 0, result.output
    return result.output.splitlines()


def test_each_rank_and_depth_answers_as_it_does_by_itself(tiny: Path, adapter: Path) -> None:
    said = lines_of(talk("abc\n/reset\n/rank 1\nabc\n/reset\n/depth 1\nabc\n/reset\n/base\n/depth all\nabc\n", adapter))
    text = "\n".join(said)
    for rank, exit, name in ((4, 2, "rank 4"), (1, 2, "rank 1"), (1, 1, "rank 1"), (None, 2, "base model")):
        answer = expected(tiny, adapter / "adapter", "abc\n", rank, exit)
        assert re.search(rf"{re.escape(answer)}\n{name}: \d+ tokens, [\d.]+ a second", text), (name, answer, text)
    assert said[0] == "rank 4, 2 of 2 layers. /help has the commands."
    assert "rank 1, 2 of 2 layers." in said
    assert "rank 1, 1 of 2 layers." in said
    assert said.count("> abc") == 4


@pytest.mark.parametrize("kind", ["dylora", "lora"])
def test_ranks_side_by_side(tiny: Path, tmp_path: Path, kind: str) -> None:
    folder = saved(tiny, tmp_path / kind, kind)
    text = "\n".join(lines_of(talk("say one\n", folder, "--compare", "1,4,0")))
    for rank, name in ((1, "rank 1"), (4, "rank 4"), (None, "base model")):
        if kind == "dylora" or rank is None:
            answer = expected(tiny, folder, "say one\n", rank)
            assert f"[{name}] {answer}\n{name}: " in text
    assert "rank 1 | rank 4 | base model, 2 of 2 layers." in text


def test_a_conversation_goes_on_until_it_is_reset(tiny: Path, adapter: Path) -> None:
    folder = adapter / "adapter"
    first = expected(tiny, folder, "abc\n", 2)
    second = expected(tiny, folder, f"abc\n{first}\nde\n", 2)
    fresh = expected(tiny, folder, "de\n", 2)
    assert len({first, second, fresh}) == 3
    text = "\n".join(lines_of(talk("abc\nde\n/reset\nde\n", adapter, "--rank", 2)))
    found = re.findall(r"> (?:abc|de)\n(.*?)\nrank 2: ", text, re.DOTALL)
    assert found == [first, second, fresh]


def test_an_instruction_stands_before_each_prompt(tiny: Path, adapter: Path) -> None:
    answer = expected(tiny, adapter / "adapter", "Say\nabc\n", 4)
    assert answer in "\n".join(lines_of(talk("abc\n", adapter, "--instruction", "Say")))


def test_a_chat_template_and_its_system_message(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    turns = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}"
    tokenizer.chat_template = turns + "{% if add_generation_prompt %}a:{% endif %}"
    folder = saved(tiny, tmp_path / "own")
    tokenizer.save_pretrained(folder)
    given: list[str] = []

    def noted(*arguments: Any) -> str:
        given.append(prompt_text(*arguments))
        return given[-1]

    monkeypatch.setattr("peft_dynamic.cli._talk.prompt_text", noted)
    answer = expected(tiny, folder, "s:be nice\nu:abc\na:", 4)
    lines_of(talk("abc\n/reset\nabc\n", folder, "--system", "be nice", "--instruction", "Say"))
    assert given == ["s:be nice\nu:Say\nabc\na:"] * 2
    given.clear()
    assert answer in "\n".join(lines_of(talk("abc\nde\n", folder, "--system", "be nice")))
    first, second = given
    assert first == "s:be nice\nu:abc\na:"
    assert second == f"s:be nice\nu:abc\na:{answer}\nu:de\na:"


def test_methods_without_ranks_of_their_own_are_cut_as_products(tiny: Path, tmp_path: Path) -> None:
    folder = saved(tiny, tmp_path / "mixed", "moslora")
    said = lines_of(talk("/rank 2\nabc\n", folder))
    assert "rank 2, 2 of 2 layers." in said
    assert any(line.startswith("rank 2: ") for line in said)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
def test_adapters_without_rows_take_turns(tiny: Path, tmp_path: Path) -> None:
    folder = saved(tiny, tmp_path / "emb", targets=["q_proj", "embed_tokens"])
    text = "\n".join(lines_of(talk("abc\n", folder, "--compare", "1,4,0")))
    for rank, name in ((1, "rank 1"), (4, "rank 4"), (None, "base model")):
        assert f"[{name}] {expected(tiny, folder, 'abc' + chr(10), rank)}\n{name}: " in text


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/rank", "/rank : must be a whole number, such as /rank 4."),
        ("/rank x", "/rank x: must be a whole number, such as /rank 4."),
        ("/rank 5", "rank 5: must be from 1 to 4, the largest rank of the adapter."),
        ("/rank 0", "rank 0: must be from 1 to 4, the largest rank of the adapter."),
        ("/depth 3", "depth=3: the model has 2 layers, so an exit is a number from 1 to 2."),
        ("/depth -1", "/depth -1: must be a whole number of layers, or all."),
        ("/compare 2,2", "'2,2': must be ranks with commas between, each once, such as 2,8,32; 0 is the base model."),
        ("/compare 2,9", "rank 9: must be from 1 to 4, the largest rank of the adapter."),
        ("/nonsense 3", "/nonsense: no such command. /help has them."),
        ("/", "/: no such command. /help has them."),
    ],
)
def test_a_bad_command_gets_one_line(adapter: Path, line: str, said: str) -> None:
    found = lines_of(talk(f"{line}\n\n", adapter))
    assert found[1:] == [f"> {line}", said]


def test_exit_ends_it(adapter: Path) -> None:
    said = lines_of(talk("/help\n/exit\nabc\n", adapter))
    assert "/compare 2,8   several ranks side by side; 0 is the base model" in said
    assert said[-1] == "> /exit"


def test_sampling_varies_and_the_default_does_not(adapter: Path) -> None:
    def answers(*options: object) -> set[str]:
        text = "\n".join(lines_of(talk("abc\n/reset\nabc\n/reset\nabc\n", adapter, *options)))
        return {*re.findall(r"> abc\n(.*?)\nrank 4: ", text, re.DOTALL)}

    assert len(answers()) == 1
    assert len(answers("--temperature", 5)) > 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--rank", 0], "--rank: 0: must be at least 1."),
        (["--rank", 5], "--rank: 5: must be at most 4, the largest rank."),
        (["--compare", "1,5"], "--compare: 5: must be at most 4, the largest rank."),
        (["--compare", "1,x"], "--compare: '1,x': must be ranks with commas between"),
        (["--compare", "1", "--rank", 1], "--compare: 1: must be alone, without --rank."),
        (["--max-new-tokens", 0], "--max-new-tokens: 0: must be at least 1."),
        (["--temperature", -1], "--temperature: -1.0: must be at least 0."),
        (["--model", "./nowhere"], "--model: ./nowhere is not a folder with a model in it."),
    ],
)
def test_options_that_are_refused(adapter: Path, options: list[object], said: str) -> None:
    result = invoke("chat", adapter, *options)
    assert result.exit_code == 2
    assert f"Invalid value for {said}" in message(result)


def test_adapters_that_are_refused(tiny: Path, tmp_path: Path) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(tiny)
    config = LoraConfig(target_modules=["q_proj"], task_type=TaskType.SEQ_CLS)
    get_peft_model(base, config).save_pretrained(tmp_path / "classifier")
    result = invoke("chat", tmp_path / "classifier")
    assert result.exit_code == 2
    assert "is of a model for SEQ_CLS, which answers nothing" in message(result)
    assert "is no folder and no name on the Hub" in message(invoke("chat", "no where"))
    assert "has no adapter_config.json" in message(invoke("chat", tmp_path))


class Terminal:
    """The command in a terminal of its own."""

    def __init__(self, *arguments: object) -> None:
        self.main, side = pty.openpty()
        words = [sys.executable, "-m", "peft_dynamic.cli", "chat", *map(str, arguments)]
        self.process = subprocess.Popen(words, stdin=side, stdout=side, stderr=side, env=environment(TERM="dumb"))
        os.close(side)
        self.seen = ""

    def until(self, wanted: str, seconds: float = 120) -> str:
        """What comes up to a text, which is then done with."""
        end = time.monotonic() + seconds
        while wanted not in self.seen:
            assert time.monotonic() < end, self.seen
            if select.select([self.main], [], [], 1)[0]:
                try:
                    self.seen += os.read(self.main, 4096).decode(errors="replace").replace("\r", "")
                except OSError:  # the other side is closed
                    raise AssertionError(self.seen) from None
        before, _, self.seen = self.seen.partition(wanted)
        return before

    def type(self, line: str) -> None:
        os.write(self.main, f"{line}\n".encode())

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def interrupt_until(self, wanted: str) -> None:
        """Ctrl-C, and again as one would where nothing comes: readline hears none just before it waits for a key."""
        for last in (False, False, True):
            self.interrupt()
            try:
                self.until(wanted, 120 if last else 10)
                return
            except AssertionError:
                if last or self.process.poll() is not None:
                    raise


def test_ctrl_c_stops_the_answer_and_twice_the_chat(tiny: Path, tmp_path: Path) -> None:
    folder = saved(tiny, tmp_path / "adapter")
    terminal = Terminal(folder, "--max-new-tokens", 100000, "--temperature", 1)
    try:
        terminal.until("> ")
        terminal.type("abc")
        terminal.until("abc\n")
        terminal.interrupt_until("Stopped. Ctrl-C again ends the chat.")
        time.sleep(2.1)  # too late for twice
        terminal.interrupt_until("Stopped. Ctrl-C again ends the chat.")
        time.sleep(2.1)
        terminal.type("/rank 2")
        terminal.until("rank 2, 2 of 2 layers.")
        terminal.interrupt_until("Ctrl-C again ends the chat.")
        terminal.interrupt()
        terminal.until("Nothing is left half done.")
        assert terminal.process.wait(timeout=60) == 130
    finally:
        terminal.process.kill()
        os.close(terminal.main)
