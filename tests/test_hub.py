"""Model cards name the import that an adapter needs, and a push uploads the adapter with its card. No network."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from peft import LoraConfig, get_peft_model
from peft.utils.peft_types import PeftType

from peft_dynamic import DyLoRAConfig
from peft_dynamic.export import export_lora
from peft_dynamic.hosts.registry import is_ours
from peft_dynamic.hub import push_adapter, write_model_card
from tests import methods
from tests.stock_cases import build


def adapted(**settings: object) -> torch.nn.Module:
    config = {"r": 4, "ranks": [1, 2, 4], "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | settings
    return get_peft_model(build("llama")[0], DyLoRAConfig(**config))


@pytest.fixture
def pushed(monkeypatch: pytest.MonkeyPatch) -> dict:
    """What was sent to the Hub: the files' texts, and the arguments of the two calls."""
    seen: dict = {}

    def create_repo(self: HfApi, repo_id: str, **kwargs: object) -> None:
        seen["created"] = {"repo_id": repo_id, "token": self.token, **kwargs}

    def create_commit(self: HfApi, operations: list, **kwargs: object) -> SimpleNamespace:
        sent = {each.path_in_repo: Path(each.path_or_fileobj).read_bytes() for each in operations}
        seen["files"] = {name: content for name, content in sent.items() if "/" not in name}
        seen["folders"] = {name.partition("/")[0] for name in sent if "/" in name}
        seen["upload"] = kwargs
        return SimpleNamespace(commit_url="https://huggingface.co/me/poet/commit/1")

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "list_repo_files", lambda *args, **kwargs: [])
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    return seen


def code_of(card: str) -> str:
    return card.partition("```python\n")[2].partition("```")[0]


def test_push_uploads_the_adapter_with_its_card(pushed: dict) -> None:
    assert push_adapter(adapted(), "me/poet", private=True, token="t") == "https://huggingface.co/me/poet/commit/1"
    assert pushed["created"] == {"repo_id": "me/poet", "token": "t", "private": True, "exist_ok": True}
    assert set(pushed["files"]) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    card = pushed["files"]["README.md"].decode()
    code = code_of(card)
    assert "import peft_dynamic" in code
    assert "model.set_rank(4)" in code
    assert 'from_pretrained(base, "me/poet")' in code
    assert "More Information Needed" not in card
    compile(code, "card", "exec")
    assert ModelCard(card).data.library_name == "peft"


def test_push_of_a_named_adapter_and_of_an_added_one(pushed: dict) -> None:
    model = adapted()
    model.add_adapter("small", DyLoRAConfig(r=2, ranks=[1, 2], target_modules=["q_proj"], task_type="CAUSAL_LM"))
    push_adapter(model, "me/poet", adapter_name="small")
    assert set(pushed["files"]) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert b'"r": 2' in pushed["files"]["adapter_config.json"]
    added = build("llama")[0]
    added.add_adapter(DyLoRAConfig(r=2, ranks=[1, 2], target_modules=["q_proj"]), "mine")
    push_adapter(added, "me/poet")
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= set(pushed["files"])
    card = pushed["files"]["README.md"].decode()
    assert "import peft_dynamic" in card
    assert "from transformers import LlamaForCausalLM" in card  # the config has no task_type


def test_the_tags_say_what_an_adapter_is(tmp_path: Path) -> None:
    made = methods.configs(quantised=True, task_type="CAUSAL_LM", sources=lambda: build("llama")[0])
    made["stock"] = lambda: LoraConfig(task_type="CAUSAL_LM")
    tags = {}
    for name, make in made.items():
        make().save_pretrained(str(tmp_path / name))
        tags[name] = ModelCard.load(write_model_card(tmp_path / name)).data.tags
    assert tags == {
        name: ["lora"] * isinstance(make(), LoraConfig) + [name.replace("-", "_")] * (name != "stock")
        for name, make in made.items()
    }
    assert tags["loretta-adp"] == ["loretta_adp"]  # small networks between the layers: no LoRA
    assert {make().peft_type for make in made.values()} >= {
        kind for kind in PeftType if is_ours(SimpleNamespace(peft_type=kind))
    }


def test_the_card_takes_the_class_from_what_peft_noted(tmp_path: Path) -> None:
    model = get_peft_model(build("llama")[0], DyLoRAConfig(r=2))
    model.save_pretrained(tmp_path / "noted")
    code = code_of(write_model_card(tmp_path / "noted").read_text())
    assert "from transformers import LlamaForCausalLM" in code
    assert "base = LlamaForCausalLM.from_pretrained(" in code
    model = get_peft_model(build("linear")[0], DyLoRAConfig(r=2, target_modules=["a"]))
    model.save_pretrained(tmp_path / "own")
    code = code_of(write_model_card(tmp_path / "own").read_text())
    assert "from_pretrained(base" in code
    assert "AutoModel" not in code
    compile(code, "card", "exec")
    DyLoRAConfig(r=2).save_pretrained(str(tmp_path / "silent"))
    with pytest.warns(UserWarning, match="says neither its task_type nor its model's class"):
        write_model_card(tmp_path / "silent")


def test_a_card_in_the_folder_where_we_are_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    DyLoRAConfig(r=2, task_type="CAUSAL_LM").save_pretrained(str(tmp_path / "poet"))
    monkeypatch.chdir(tmp_path / "poet")
    assert write_model_card(".") == Path("README.md")
    assert 'PeftModel.from_pretrained(base, "poet")' in Path("README.md").read_text()


@pytest.mark.parametrize("method", methods.configs())
def test_a_card_says_what_any_method_needs(pushed: dict, method: str) -> None:
    model = get_peft_model(build("llama")[0], methods.configs()[method]())
    push_adapter(model, "me/poet")
    code = code_of(pushed["files"]["README.md"].decode())
    kind = model.peft_config["default"].peft_type.value
    assert f"import peft_dynamic  # registers {kind} with PEFT" in code
    assert ("set_rank" in code) == hasattr(model, "set_rank")
    compile(code, "card", "exec")


def test_nothing_is_pushed_under_a_bad_name_or_without_an_adapter(pushed: dict) -> None:
    with pytest.raises(ValueError, match="repo_id='a/b/c' is no repository name"):
        push_adapter(adapted(), "a/b/c")
    with pytest.raises(ValueError, match="no adapter of peft_dynamic"):
        push_adapter(build("llama")[0], "me/poet")
    assert not pushed


@pytest.mark.parametrize(
    ("truncation", "words"),
    [("svd", "b leading singular components of its update"), ("prefix", "first b rows and columns of its factors")],
)
def test_the_card_says_what_a_rank_is(tmp_path: Path, truncation: str, words: str) -> None:
    adapted(truncation=truncation).save_pretrained(tmp_path)
    assert f"Rank b is the {words}. It needs" in ModelCard.load(write_model_card(tmp_path)).text


def test_a_card_is_written_once_and_leaves_the_users_text(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("---\nlicense: mit\ntags: [poems]\n---\n\n# Poems\n\nTrained with love.\n")
    for _ in range(2):
        assert write_model_card(tmp_path, "me/poet") == tmp_path / "README.md"
    card = ModelCard.load(tmp_path / "README.md")
    assert card.text.count("import peft_dynamic  #") == 1
    assert "# Poems\n\nTrained with love." in card.text
    assert card.data.license == "mit"
    assert card.data.tags == ["poems", "lora", "dylora"]


def test_the_base_model_is_named_if_others_can_find_it(tmp_path: Path) -> None:
    model = adapted()
    for name, known in [("HuggingFaceTB/SmolLM2-135M", True), (str(tmp_path), False), ("", False)]:
        model.peft_config["default"].base_model_name_or_path = name
        folder = tmp_path / f"{known}{len(name)}"
        folder.mkdir(parents=True)
        model.peft_config["default"].save_pretrained(str(folder))
        card = ModelCard.load(write_model_card(folder))
        assert card.data.base_model == (name if known else None)
        assert str(tmp_path) not in card.text


def test_a_stock_export_needs_no_import(tmp_path: Path) -> None:
    card = ModelCard.load(export_lora(adapted(), tmp_path / "out", rank=2) / "README.md")
    assert "import peft_dynamic" not in card.text
    assert "AutoModelForCausalLM" in code_of(card.text)
    assert "dylora" not in card.data.tags


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config\.json"):
        write_model_card(tmp_path)
