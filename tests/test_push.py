"""A push to a Hub on loopback: what goes up, what strangers make of it, and what a push that breaks leaves."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load, load_file

from peft_dynamic import DyLoRAConfig, export_lora, resize_adapter
from peft_dynamic.hub import push_adapter
from tests import hub_server, methods
from tests.conformance.cases import perturb
from tests.hub_server import TOKEN, Hub
from tests.stock_cases import build, compute

hub = hub_server.hub  # fixture
TARGETS = ["q_proj", "down_proj"]
pytestmark = pytest.mark.filterwarnings(hub_server.HOSTS_WARNING)


def adapted(**settings: Any) -> Any:
    config = {"r": 8, "ranks": [1, 2, 4, 8], "target_modules": TARGETS, "task_type": "CAUSAL_LM"} | settings
    model = get_peft_model(build("llama")[0], DyLoRAConfig(**config))
    perturb(model)
    return model.eval()


def stock(**settings: Any) -> Any:
    config = {"r": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM"} | settings
    model = get_peft_model(build("llama")[0], LoraConfig(**config))
    perturb(model)
    return model.eval()


def folders(hub: Hub, repo: str = "me/poet", revision: str = "main") -> list[str]:
    return sorted({name.rpartition("/")[0] for name in hub.files(repo, revision)} - {""})


def tensors(hub: Hub, folder: str, repo: str = "me/poet") -> dict[str, torch.Tensor]:
    return load(hub.files(repo)[f"{folder}/adapter_model.safetensors".lstrip("/")])


def config(hub: Hub, folder: str = "", repo: str = "me/poet") -> dict[str, Any]:
    return json.loads(hub.files(repo)[f"{folder}/adapter_config.json".lstrip("/")])


def test_the_twins_are_what_an_export_is(hub: Hub, tmp_path: Path) -> None:
    model = adapted()
    address = push_adapter(model, "me/poet", private=True)
    assert address.startswith(f"{hub.url}/me/poet/commit/")
    assert hub.private == {"me/poet"}
    assert hub.history("me/poet") == ["initial commit", "Upload adapter"]
    assert folders(hub) == ["rank-1", "rank-2", "rank-4", "rank-8"]
    assert config(hub)["peft_type"] == "DYLORA"
    for rank in (1, 2, 4, 8):
        export_lora(model, tmp_path / str(rank), rank=rank)
        expected = load_file(tmp_path / str(rank) / "adapter_model.safetensors")
        found = tensors(hub, f"rank-{rank}")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert (config(hub, f"rank-{rank}")["peft_type"], config(hub, f"rank-{rank}")["r"]) == ("LORA", rank)
        assert (
            f'from_pretrained(base, "me/poet", subfolder="rank-{rank}")'
            in hub.files("me/poet")[f"rank-{rank}/README.md"].decode()
        )


def test_a_few_ranks_if_nobody_says_which(hub: Hub) -> None:
    push_adapter(adapted(r=32, ranks=[1, 2, 4, 8, 16, 32]), "me/poet")
    assert folders(hub) == ["rank-16", "rank-32", "rank-4", "rank-8"]
    push_adapter(adapted(r=6, ranks=None), "me/six", ranks=None)
    assert folders(hub, "me/six") == ["rank-1", "rank-3", "rank-6"]
    push_adapter(stock(), "me/stock")
    assert folders(hub, "me/stock") == ["rank-1", "rank-2", "rank-4"]  # rank 8 is at the top
    push_adapter(stock(), "me/none", ranks=[])
    assert folders(hub, "me/none") == []


def test_a_stock_lora_has_its_smaller_ranks_as_twins(hub: Hub, tmp_path: Path) -> None:
    model = stock(rank_pattern={"q_proj": 3})
    push_adapter(model, "me/poet", ranks=[4])
    model.save_pretrained(tmp_path / "saved")
    resize_adapter(tmp_path / "saved", tmp_path / "4", rank=4)
    expected = load_file(tmp_path / "4" / "adapter_model.safetensors")
    assert all(torch.equal(value, expected[name]) for name, value in tensors(hub, "rank-4").items())
    whole = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    assert all(torch.equal(value, whole[name]) for name, value in tensors(hub, "").items())
    card = hub.files("me/poet")["README.md"].decode()
    assert "import peft_dynamic" not in card
    assert "## Smaller ranks" in card
    assert "vLLM" not in card  # it knows one rank, and these have several


@pytest.mark.parametrize("kind", ["dylora", "stock"])
def test_a_folder_gives_what_the_model_gives(hub: Hub, tmp_path: Path, kind: str) -> None:
    model = adapted() if kind == "dylora" else stock()
    model.save_pretrained(tmp_path)
    (tmp_path / "optimizer.pt").write_bytes(b"not for strangers")
    (tmp_path / "tokenizer.json").write_text("{}")
    push_adapter(model, "me/model", ranks=[2, 4])
    push_adapter(tmp_path, "me/folder", ranks=[4, 2])
    mine, theirs = hub.files("me/folder"), hub.files("me/model")
    assert mine.pop("tokenizer.json") == b"{}"
    assert mine.keys() == theirs.keys()
    for name, content in mine.items():
        if name.endswith(".safetensors"):
            assert load(content).keys() == load(theirs[name]).keys()
            assert all(torch.equal(value, load(theirs[name])[key]) for key, value in load(content).items())


def test_a_stock_lora_at_the_top(hub: Hub, tmp_path: Path) -> None:
    model = adapted()
    push_adapter(model, "me/poet", ranks=[2, 4], lora_rank=4)
    assert (config(hub)["peft_type"], config(hub)["r"]) == ("LORA", 4)
    assert config(hub, "dynamic")["peft_type"] == "DYLORA"
    assert folders(hub) == ["dynamic", "rank-2"]  # rank 4 is at the top
    card = hub.files("me/poet")["README.md"].decode()
    first, _, rest = card.partition("## Every rank")
    assert "import peft_dynamic" not in first
    assert 'subfolder="dynamic")\nmodel.set_rank(8)' in rest
    assert ModelCard(card).data.tags == ["transformers", "lora", "dylora"]
    push_adapter(stock(), "me/stock", ranks=[2], lora_rank=4)
    assert config(hub, repo="me/stock")["r"] == 4
    assert folders(hub, "me/stock") == ["rank-2", "rank-8"]
    push_adapter(stock(), "me/stock", ranks=[2], lora_rank=8)  # it is that
    assert (config(hub, repo="me/stock")["r"], folders(hub, "me/stock")) == (8, ["rank-2"])


OURS = methods.configs(lora=True, sources=lambda: build("llama")[0], task_type="CAUSAL_LM")


@pytest.mark.parametrize("method", OURS)
def test_every_lora_of_ours_has_twins(hub: Hub, tmp_path: Path, method: str) -> None:
    model = get_peft_model(build("llama")[0], OURS[method]())
    perturb(model)
    push_adapter(model.eval(), "me/poet", ranks=[2, 4])
    inputs = build("llama")[1]
    for name, content in hub.files("me/poet").items():
        if name.startswith("rank-4/"):
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
    found = PeftModel.from_pretrained(build("llama")[0], tmp_path / "rank-4").eval()
    torch.testing.assert_close(compute(found, inputs), compute(model, inputs))
    assert config(hub, "rank-2")["r"] == 2


def test_what_is_no_lora_goes_up_alone(hub: Hub) -> None:
    model = get_peft_model(build("llama")[0], methods.configs()["loretta-adp"](task_type="CAUSAL_LM"))
    push_adapter(model, "me/poet")
    assert folders(hub) == []
    with pytest.raises(ValueError, match="no plain-LoRA twins: LoRETTA_adp is made of small networks"):
        push_adapter(model, "me/poet", ranks=[2])
    dora = stock(use_dora=True)
    with pytest.warns(UserWarning, match="the repository has no plain-LoRA twins: .*use_dora"):
        push_adapter(dora, "me/dora")
    assert folders(hub, "me/dora") == []
    with pytest.raises(ValueError, match="use_dora"):
        push_adapter(dora, "me/dora", ranks=[2])


def test_bad_arguments_send_nothing(hub: Hub, tmp_path: Path) -> None:
    model = adapted()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"ranks": [9]}, "ranks=9: must be a whole number from 1 to 8"),
        ({"ranks": [2.0]}, "ranks=2.0: must be a whole number from 1 to 8"),
        ({"lora_rank": 0}, "lora_rank=0: must be a whole number from 1 to 8"),
        ({"license": "my own: licence"}, "license='my own: licence': must be one of the Hub's names"),
        ({"base_model": "/home/me/model"}, "base_model='/home/me/model': must be a name on the Hub"),
        ({"create_pr": True, "revision": "x"}, "revision='x': a pull request goes to the main branch"),
        ({"adapter_name": "other"}, "adapter_name='other' is no adapter"),
    ]
    for arguments, words in cases:
        with pytest.raises(ValueError, match=words):
            push_adapter(model, "me/poet", **arguments)
    for name in ("a/b/c", "a--b", "../x", "x" * 97, "me/po et"):
        with pytest.raises(ValueError, match="is no repository name"):
            push_adapter(model, name)
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config\.json"):
        push_adapter(tmp_path, "me/poet")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(FileNotFoundError, match=r"has no adapter_model\.safetensors"):
        push_adapter(tmp_path, "me/poet")
    assert not hub.requests


def test_a_second_push_leaves_no_twins_of_the_first(hub: Hub) -> None:
    push_adapter(adapted(), "me/poet", ranks=[1, 2, 4], lora_rank=8)
    hub.commit("me/poet", "main", "mine", hub.files("me/poet") | {"rank-x/notes.md": b"x", "rank-1/mine.txt": b"y"})
    push_adapter(stock(), "me/poet", ranks=[2])
    assert sorted(hub.files("me/poet")) == [
        *(".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors", "rank-1/mine.txt"),
        *("rank-2/README.md", "rank-2/adapter_config.json", "rank-2/adapter_model.safetensors", "rank-x/notes.md"),
    ]


@pytest.mark.parametrize("place", ["upload", "commit"])
def test_a_push_that_breaks_leaves_the_old_revision_whole(hub: Hub, place: str) -> None:
    push_adapter(stock(), "me/poet", ranks=[2])
    before = hub.files("me/poet")
    hub.failing.add(place)
    with pytest.raises((HfHubHTTPError, RuntimeError)) as raised:
        push_adapter(adapted(), "me/poet", ranks=[4])
    assert TOKEN not in str(raised.value)
    assert hub.files("me/poet") == before
    assert len(hub.history("me/poet")) == 2
    hub.failing.clear()
    push_adapter(adapted(), "me/poet", ranks=[4])
    assert folders(hub) == ["rank-4"]


def test_branches_and_pull_requests(hub: Hub) -> None:
    model = stock()
    push_adapter(model, "me/poet", ranks=[2], commit_message="First")
    push_adapter(model, "me/poet", ranks=[4], revision="next", commit_message="Next")
    assert (folders(hub), folders(hub, revision="next")) == (["rank-2"], ["rank-4"])
    assert hub.history("me/poet", "next") == ["initial commit", "First", "Next"]
    assert push_adapter(model, "me/poet", ranks=[1], create_pr=True) == f"{hub.url}/me/poet/discussions/1"
    assert (folders(hub), folders(hub, revision="refs/pr/1")) == (["rank-2"], ["rank-1"])


def test_no_token_and_no_place_of_this_machine_goes_up(hub: Hub, tmp_path: Path) -> None:
    base = tmp_path / "models" / "mine"
    model = build("llama")[0]
    model.save_pretrained(base)
    model = get_peft_model(type(model).from_pretrained(base), LoraConfig(r=4, task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "saved")
    assert str(base) in (tmp_path / "saved" / "README.md").read_text()  # by PEFT
    push_adapter(model, "me/model", lora_rank=2)
    push_adapter(tmp_path / "saved", "me/folder")
    assert b"adapter_model" in hub.everything()
    for secret in (TOKEN, str(tmp_path), base.name + '"', os.environ.get("USER") or "nobody-here"):
        assert secret.encode() not in hub.everything()
    assert config(hub, repo="me/folder")["base_model_name_or_path"] is None
    push_adapter(tmp_path / "saved", "me/named", base_model="you/base", ranks=[2])
    for folder in ("", "rank-2"):
        assert config(hub, folder, "me/named")["base_model_name_or_path"] == "you/base"
        assert (
            ModelCard(hub.files("me/named")[f"{folder}/README.md".lstrip("/")].decode()).data.base_model == "you/base"
        )


def test_what_the_owner_wrote_in_the_repository_stays(hub: Hub, tmp_path: Path) -> None:
    push_adapter(adapted(), "me/poet", ranks=[2])
    written = "---\nlicense: mit\ntags: [poems]\n---\n\n# Poems\n\nTrained with love.\n"
    hub.commit("me/poet", "main", "mine", hub.files("me/poet") | {"README.md": written.encode()})
    adapted().save_pretrained(tmp_path)
    for source in (adapted(), tmp_path):
        push_adapter(source, "me/poet", ranks=[4])
        card = ModelCard(hub.files("me/poet")["README.md"].decode())
        assert "# Poems\n\nTrained with love." in card.text
        assert 'subfolder="rank-4"' in card.text
        assert "More Information Needed" not in card.text
        assert card.data.license == "mit"
        assert {"poems", "lora", "dylora"} <= set(card.data.tags)
    (tmp_path / "README.md").write_text("---\n{}\n---\n\nOf the folder.\n")
    push_adapter(tmp_path, "me/poet", ranks=[4], license="apache-2.0")
    card = ModelCard(hub.files("me/poet")["README.md"].decode())
    assert card.text.rstrip().endswith("Of the folder.")
    assert "Poems" not in card.text
    assert card.data.license == "apache-2.0"


STRANGER = """
import sys, torch
from peft import PeftModel
from safetensors.torch import save_file
from tests.stock_cases import build, compute

def logits(**place):
    model, inputs = build("llama")
    found = PeftModel.from_pretrained(model, **place).eval()
    return found, compute(found, inputs)

seen = {f"stock-{rank}": logits(model_id="me/poet", subfolder=f"rank-{rank}")[1] for rank in (2, 8)}
seen["top"] = logits(model_id="me/top")[1]
assert not [name for name in sys.modules if name.startswith("peft_dynamic")]
import peft_dynamic
for name, place in (("ours", {"model_id": "me/poet"}), ("dynamic", {"model_id": "me/top", "subfolder": "dynamic"})):
    model, _ = logits(**place)
    for rank in (2, 8):
        model.set_rank(rank)
        seen[f"{name}-{rank}"] = compute(model, build("llama")[1])
save_file({name: value.contiguous() for name, value in seen.items()}, sys.argv[1])
"""


def test_strangers_pull_by_name_and_get_equal_logits(hub: Hub, tmp_path: Path) -> None:
    model, inputs = adapted(), build("llama")[1]
    push_adapter(model, "me/poet", ranks=[2, 8])
    push_adapter(model, "me/top", ranks=[], lora_rank=2)
    root = Path(__file__).parents[1]
    variables = {**os.environ, **hub_server.environment(hub, tmp_path / "home", token=None), "PYTHONPATH": str(root)}
    variables.pop("HF_TOKEN")
    command = [sys.executable, "-W", "ignore", "-c", STRANGER, str(tmp_path / "seen")]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = load_file(tmp_path / "seen")
    assert len(seen) == 7
    for name, found in seen.items():
        with model.at_rank(8 if name.endswith("8") else 2):
            torch.testing.assert_close(found, compute(model, inputs), rtol=0, atol=0)


def test_plain_push_to_hub_carries_the_twins_that_the_configuration_names(hub: Hub, tmp_path: Path) -> None:
    model = adapted(hub_ranks=[2, 4])
    model.push_to_hub("me/poet")
    assert folders(hub) == ["rank-2", "rank-4"]
    export_lora(model, tmp_path / "4", rank=4)
    expected = load_file(tmp_path / "4" / "adapter_model.safetensors")
    assert all(torch.equal(value, expected[name]) for name, value in tensors(hub, "rank-4").items())
    assert hub.history("me/poet") == ["initial commit", "Upload model"]
    adapted().push_to_hub("me/none")
    assert folders(hub, "me/none") == []


def test_plain_push_to_hub_keeps_our_card(hub: Hub) -> None:
    push_adapter(adapted(), "me/poet", ranks=[2])
    adapted().push_to_hub("me/poet")
    assert "import peft_dynamic  # registers" in hub.files("me/poet")["README.md"].decode()
