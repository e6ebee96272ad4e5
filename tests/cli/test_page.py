"""`peft-dynamic app`: visitors at several ranks at once get what the ranks give by themselves, over HTTP."""

import json
import re
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from peft_dynamic.ranks import RankCurve, RankRow
from tests.cli import common
from tests.cli.common import environment, forked, invoke, message
from tests.cli.test_chat import LENGTH, expected, loaded, said_by, saved
from tests.processes import Started, free_port

elsewhere, tiny = common.elsewhere, common.tiny  # fixtures

PROMPTS = ["abc", "say one"]
SAMPLES = "## Samples\n\n```text\nSay it.\n\n[base model] yes\n```\n"


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with a curve and a report."""
    folder = tmp_path_factory.mktemp("run")
    saved(tiny, folder / "adapter")
    rows = [RankRow(rank, {"loss": loss}) for rank, loss in ((None, 3.0), (1, 2.0), (2, 1.5), (4, 1.25))]
    RankCurve(rows).to_json(folder / "curve.json")
    (folder / "report.md").write_text(f"# One run\n\nText.\n\n{SAMPLES}\n## Use it\n\nNot shown.\n", encoding="utf-8")
    return folder


CODE = """
import sys
import torch
from peft_dynamic.cli import _load, main
_load.fast_dtype = lambda: torch.float32  # whatever is fast here
sys.argv[0] = "bin/peft-dynamic"
main()
"""


@pytest.fixture(scope="module")
def address(run: Path) -> Iterator[str]:
    """Where the command serves the page, in a process of its own."""
    pytest.importorskip("gradio")
    port = free_port()
    words = ("app", str(run), "--port", str(port), "--max-new-tokens", str(LENGTH))
    server = Started("-c", (CODE, *words), run, environment())
    said = next(server.lines(240), "")
    if not said.startswith("Open"):
        raise AssertionError(server.ended(1).stderr)
    assert said == f"Open http://127.0.0.1:{port} in a browser. Ctrl-C ends it.\n"
    yield f"http://127.0.0.1:{port}"
    server.process.terminate()
    ended = server.ended(60)
    assert ended.returncode == 128 + 15
    assert ended.stderr == "Stopped. Nothing is left half done.\n"


def read(url: str, **given: Any) -> str:
    asked = urllib.request.Request(url, headers={"Content-Type": "application/json"})
    if given:
        asked.data = json.dumps(given).encode()
    with urllib.request.urlopen(asked, timeout=120) as answer:
        return answer.read().decode()


def asked(address: str, name: str, *given: Any) -> tuple[str, Any]:
    """How a call over HTTP ended, and with what: as gradio's own clients do it."""
    url = f"{address}/gradio_api/call/{name}"
    events = read(f"{url}/{json.loads(read(url, data=given))['event_id']}").strip().split("\n\n")
    kind, data = (line.partition(": ")[2] for line in events[-1].split("\n"))
    return kind, json.loads(data)


def test_two_visitors_at_different_ranks_at_once(tiny: Path, run: Path, address: str) -> None:
    wanted = [(prompt, rank, depth) for prompt in PROMPTS for rank in (1, 2, 4) for depth in (1, 2)]

    def visit(mine: list[Any]) -> list[Any]:
        return [asked(address, "answer", *each, True) for each in mine]

    halves = [wanted[::2], wanted[1::2][::-1]]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(visit, halves))
    base, model = loaded(tiny, run / "adapter")
    seen = set()
    for (prompt, rank, depth), (kind, answer) in zip([*halves[0], *halves[1]], [*found[0], *found[1]], strict=True):
        model.set_rank(rank)
        assert kind == "complete"
        assert answer[0] == said_by(model, tiny, f"{prompt}\n", depth)
        assert answer[2] == said_by(base, tiny, f"{prompt}\n", depth)
        assert answer[1].endswith(" a second, stopped") or answer[1].endswith(" a second")
        seen.add(answer[0])
    assert len(seen) > 4  # else it would show little


def test_without_the_base_model_beside_it(tiny: Path, run: Path, address: str) -> None:
    _, (text, _, base, base_speed) = asked(address, "answer", "abc", 2, 2, False)
    assert text == expected(tiny, run / "adapter", "abc\n", 2)
    assert base == base_speed == ""


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("abc", 5, 2), "rank 5: must be from 1 to 4"),
        (("abc", 0, 2), "rank 0: must be from 1 to 4"),
        (("abc", 1.5, 2), "rank 1.5: must be a whole number"),
        (("abc", 1, 3), "depth=3: the model has 2 layers"),
        ((" ", 1, 2), "The prompt is empty."),
    ],
)
def test_what_a_visitor_may_not_send(address: str, given: Any, said: str) -> None:
    kind, data = asked(address, "answer", *given, True)
    assert kind == "error"
    assert said in str(data)


def test_the_curve_marks_the_rank(address: str) -> None:
    found = {}
    for rank, said in ((2, "rank 2: loss 1.5"), (4, "rank 4: loss 1.25"), (3, "rank 3 was not measured")):
        _, (drawn,) = asked(address, "curve", rank)
        assert f"<title>{said}" in drawn
        assert drawn.count('class="marked"') == 1
        assert drawn.count('r="3"') == 3
        found[rank] = drawn.partition('class="marked" cx="')[2][:5]
    assert (found[2], found[4]) == ("340.0", "620.0")  # halfway of the powers of two, and the end


def test_the_page_has_the_samples_and_nothing_from_the_network(address: str) -> None:
    page, config = read(address), json.loads(read(f"{address}/config"))
    assert config["analytics_enabled"] is False
    assert config["stylesheets"] == []  # of fonts
    assert "googleapis" not in page
    texts = [part["props"].get("value") for part in config["components"]]
    assert SAMPLES.removeprefix("## Samples\n").strip() in texts


def test_a_port_that_is_taken(run: Path, address: str) -> None:
    ended = forked("app", run, "--port", address.rpartition(":")[2])
    assert ended.returncode == 1
    assert re.fullmatch(r"Error: --host 127.0.0.1 --port \d+: .* Pass another --port\.\n", ended.stderr)


@pytest.mark.parametrize(
    ("options", "said"),
    [(["--port", 0], "--port: 0: must be from 1 to 65535."), (["--max-new-tokens", 0], "--max-new-tokens: 0: must")],
)
def test_options_that_are_refused(run: Path, options: list[object], said: str) -> None:
    result = invoke("app", run, *options)
    assert result.exit_code == 2
    assert f"Invalid value for {said}" in message(result)


def test_without_gradio_it_says_how_to_install_it(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft_dynamic.cli._edge.has_package", lambda name: name != "gradio")
    result = invoke("app", run)
    assert result.exit_code == 1
    assert "peft-dynamic app needs gradio. Install it with: pip install gradio" in message(result)
    assert "pip install '.[app]'" in message(result)
