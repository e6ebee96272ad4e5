"""`peft-dynamic push` and `card`: what they send and say, and what goes wrong in one line, without a token in it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, constants

from peft_dynamic.cli._hub import without_token
from tests import hub_server
from tests.cli import common
from tests.cli.common import command, invoke, message
from tests.hub_server import TOKEN, Hub
from tests.test_cards import run_folder
from tests.test_push import adapted, folders, stock

elsewhere, hub = common.elsewhere, hub_server.hub  # fixtures
pytestmark = pytest.mark.filterwarnings(hub_server.HOSTS_WARNING)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A DyLoRA adapter, a stock LoRA, and a run."""
    folder = tmp_path_factory.mktemp("saved")
    adapted().save_pretrained(folder / "dylora")
    stock().save_pretrained(folder / "lora")
    run_folder(folder / "run")
    return {name: folder / name for name in ("dylora", "lora", "run")}


def test_the_command_pushes_in_a_process_of_its_own(tmp_path: Path, saved: dict[str, Path]) -> None:
    with hub_server.running() as server:
        variables = hub_server.environment(server, tmp_path / "home")
        done = command("push", saved["dylora"], "me/poet", "--ranks", "2,4", "--private", "--json", **variables)
        assert (done.returncode, done.stderr) == (0, "")
        told = json.loads(done.stdout)
        oid = server.repos["me/poet"]["main"][-1][0]
        assert (told["repo"], told["url"]) == ("me/poet", f"{server.url}/me/poet/commit/{oid}")
        files = server.files("me/poet")
        assert {each["path"]: each["bytes"] for each in told["files"]} == {
            name: len(content) for name, content in files.items() if name != ".gitattributes"
        }
        assert [twin["rank"] for twin in told["twins"]] == [2, 4]
        assert server.private == {"me/poet"}
        for secret in (TOKEN, str(tmp_path), str(saved["dylora"].parent)):
            assert secret not in done.stdout
            assert secret.encode() not in server.everything()


def test_a_run_is_pushed_with_its_figures(hub: Hub, saved: dict[str, Path]) -> None:
    result = invoke("push", saved["run"], "me/poet", "--license", "mit", "--base-model", "you/base", "--message", "New")
    assert result.exit_code == 0, result.output
    assert "Stock LoRAs of rank 2, 4, 8" in message(result)
    assert "The card shows 2 samples of the run's report; --no-samples leaves them out." in message(result)
    card = ModelCard(hub.files("me/poet")["README.md"].decode())
    assert card.data.license == "mit"
    assert {each.metric_name for each in card.data.eval_results} == {"loss (rank 4)", "a|b (rank 4)"}
    assert "vllm serve you/base --enable-lora --max-lora-rank 8 --lora-modules poet=poet/rank-4" in card.text
    assert hub.files("me/poet")["curve.png"] == b"a picture"
    assert hub.history("me/poet")[-1] == "New"
    assert not {"run.yaml", "report.md", "curve.json"} & hub.files("me/poet").keys()
    assert b"alice" not in hub.everything()
    result = invoke("push", saved["run"], "me/poet", "--no-samples", "--lora-rank", 4, "--create-pr", "--ranks", "none")
    assert result.exit_code == 0, result.output
    assert f"{hub.url}/me/poet/discussions/1" in message(result)
    assert "The base model's name on the Hub is not known" in message(result)
    assert folders(hub, revision="refs/pr/1") == ["dynamic"]
    assert "## Samples" not in hub.files("me/poet", "refs/pr/1")["README.md"].decode()


def test_a_dry_run_sends_and_writes_nothing(hub: Hub, saved: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    before = {path: path.stat().st_mtime_ns for path in saved["lora"].rglob("*")}
    result = invoke("push", saved["lora"], "me/poet", "--dry-run")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    size = (saved["lora"] / "adapter_model.safetensors").stat().st_size
    assert f"adapter_model.safetensors         {size:>12,}" in lines
    assert [line.split()[0] for line in lines if line.startswith("rank-")] == [
        f"rank-{rank}/{file}"
        for rank in (1, 2, 4)
        for file in ("README.md", "adapter_config.json", "adapter_model.safetensors")
    ]
    assert "would go to me/poet. Nothing was sent." in message(result)
    told = json.loads(invoke("push", saved["lora"], "me/poet", "--dry-run", "--json").output)
    assert (told["dry_run"], told["url"], len(told["files"])) == (True, None, 12)
    assert not hub.requests
    assert before == {path: path.stat().st_mtime_ns for path in saved["lora"].rglob("*")}
    assert not list(Path.cwd().iterdir())


SLIPS: list[tuple[list[str], str]] = [
    (["nowhere", "me/x"], "ADAPTER: nowhere has no adapter_config.json"),
    (["lora", "a/b/c"], "REPO: a/b/c is no name of a repository. Pass user/name."),
    (["lora", "a--b"], "REPO: repo_id='a--b' is no repository name"),
    (["lora", "hf_abcdefghijklmnop"], "REPO: this is a token, not a name"),
    (["lora", "me/x", "--ranks", "4,x"], "--ranks: 4,x: must be whole numbers, such as 4,8; or none"),
    (["lora", "me/x", "--ranks", "0"], "--ranks: 0: must be ranks of at least 1"),
    (["lora", "me/x", "--ranks", "9"], "ranks=9: must be a whole number from 1 to 8"),
    (["lora", "me/x", "--lora-rank", "0"], "--lora-rank: 0: must be at least 1"),
    (["lora", "me/x", "--lora-rank", "9"], "lora_rank=9: must be a whole number from 1 to 8"),
    (["lora", "me/x", "--license", "a b"], "--license: a b: must be a name of the Hub's"),
    (["lora", "me/x", "--base-model", "/m"], "--base-model: /m is no name of a repository"),
    (["lora", "me/x", "--curve", "no.json"], "--curve: no.json is not there"),
    (["lora", "me/x", "--revision", "b", "--create-pr"], "--revision: a pull request goes to the main branch"),
]


@pytest.mark.parametrize(("words", "told"), SLIPS)
def test_a_slip_names_the_option_and_sends_nothing(
    hub: Hub, saved: dict[str, Path], words: list[str], told: str
) -> None:
    words = [str(saved.get(words[0], words[0])), *words[1:]]
    result = invoke("push", *words)
    assert result.exit_code == 2, result.output
    assert told in message(result)
    assert "abcdefghijklmnop" not in result.output
    assert not hub.requests


def error_of(result: Any) -> str:
    """The one line on stderr."""
    assert result.exit_code == 1, result.output
    lines = [line for line in result.output.splitlines() if line.startswith("Error")]
    assert len(lines) == 1
    assert TOKEN not in result.output
    assert "Traceback" not in result.output
    return lines[0]


def test_what_the_hub_refuses_is_one_line(hub: Hub, saved: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    assert invoke("push", saved["lora"], "me/poet", "--ranks", "2").exit_code == 0
    before = hub.files("me/poet")
    hub.failing.add("upload")
    again = ("push", saved["dylora"], "me/poet", "--ranks", "4")
    assert "REPO: the Hub refused me/poet (The storage is full). Use a token that may write" in error_of(invoke(*again))
    hub.failing = {"commit"}
    assert "REPO: the Hub answered 500" in error_of(invoke(*again))
    assert "me/poet is as it was; push again." in error_of(invoke(*again))
    hub.failing.clear()
    said = error_of(invoke(*again, "--license", "nonsense"))
    assert '"license" must be one of' in said
    monkeypatch.setenv("HF_TOKEN", "hf_expired0expired0")
    said = error_of(invoke(*again))
    assert said.startswith("Error: HF_TOKEN: the Hub does not know the token, or it has expired. Log in with: hf auth")
    assert "expired0" not in said
    monkeypatch.delenv("HF_TOKEN")
    assert error_of(invoke(*again)).startswith("Error: HF_TOKEN: there is no token of the Hub on this machine.")
    assert hub.files("me/poet") == before


def test_no_way_to_the_hub_is_one_line(hub: Hub, saved: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    words = ("push", saved["lora"], "me/poet", "--ranks", "2")
    assert "Error: REPO: the Hub cannot be reached (ConnectError" in error_of(invoke(*words))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "Error: REPO: HF_HUB_OFFLINE is set, so that nothing can be sent." in error_of(invoke(*words))
    assert not hub.requests


def test_the_card_of_an_adapter(tmp_path: Path, saved: dict[str, Path]) -> None:
    run = tmp_path / "run"
    shutil.copytree(saved["run"], run)
    (run / "adapter" / "README.md").write_text("# Mine\n")
    result = invoke("card", run, "--license", "mit", "--repo", "me/poet")
    assert result.exit_code == 0, result.output
    assert f"The card is in {run / 'adapter' / 'README.md'}." in message(result)
    card = ModelCard.load(run / "adapter" / "README.md")
    assert card.text.rstrip().endswith("# Mine")
    assert card.data.license == "mit"
    assert 'PeftModel.from_pretrained(base, "me/poet")' in card.text
    (tmp_path / "other.json").write_text('{"rows": [{"rank": 2, "metrics": {"accuracy": 0.75}}]}')
    told = json.loads(invoke("card", run, "--curve", tmp_path / "other.json", "--no-samples", "--json").output)
    assert told == {
        "card": str(run / "adapter" / "README.md"),
        "picture": str(run / "adapter" / "curve.png"),
        "recommended": 4,  # what the run exported
        "samples": 0,
    }
    assert "| 2 | 0.75 |" in (run / "adapter" / "README.md").read_text()


def test_slips_of_card_name_the_option(tmp_path: Path, saved: dict[str, Path]) -> None:
    (tmp_path / "no.json").write_text("{}")
    cases = [
        (["nowhere"], "ADAPTER: nowhere has no adapter_config.json"),
        ([saved["lora"], "--license", "a b"], "--license: a b: must be a name of the Hub's"),
        ([saved["lora"], "--repo", "a/b/c"], "--repo: a/b/c is no name of a repository"),
        ([saved["lora"], "--curve", tmp_path / "no.json"], "is no rank curve"),
    ]
    for words, told in cases:
        result = invoke("card", *words)
        assert result.exit_code == 2, result.output
        assert told in message(result)


def test_a_token_is_taken_out_of_any_text() -> None:
    assert without_token(f"a {TOKEN}, b") == "a hf_***, b"


def test_what_was_pushed_is_what_was_saved(hub: Hub, saved: dict[str, Path]) -> None:
    assert invoke("push", saved["dylora"], "me/poet", "--revision", "next", "--ranks", "none").exit_code == 0
    content = hub.files("me/poet", "next")["adapter_model.safetensors"]
    assert content == (saved["dylora"] / "adapter_model.safetensors").read_bytes()
    assert sorted(hub.files("me/poet")) == [".gitattributes"]
