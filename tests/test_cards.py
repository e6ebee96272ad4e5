"""What a card says of a run, and that no foreign text in it becomes markup, code or metadata."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import LoraConfig
from safetensors.torch import save_file

from peft_dynamic import DyLoRAConfig, RankCurve, write_card
from peft_dynamic.cards import CardFacts, Twin, write_model_card
from peft_dynamic.cards.text import code, fenced, inline, literal, one_line, table
from peft_dynamic.hub.known import samples_of
from peft_dynamic.ranks import RankRow

NASTY = [
    "`rm -rf`",
    "a|b",
    "</details><script>alert(1)</script>",
    "line\n---\nlicense: mit",
    "```\n# out",
    "<!-- peft_dynamic: end of usage -->",
    "[x](javascript:alert(1))",
    "![x](http://evil/x.png)",
    "https://evil.example www.evil.example",
    "*b* _i_ ~s~ $m$ @you #1 \\",
    "\x1b[31mred\u202egnp.exe",
    'quote " and \\" back',
    "\ud800 half",
    "",
]


@pytest.mark.parametrize("text", NASTY)
def test_foreign_text_stays_text(text: str) -> None:
    shown = inline(text)
    assert "\n" not in shown
    assert "<" not in shown
    assert "://" not in shown
    assert not re.search(r"[`*_\[\]|~$@#!\\]", re.sub(r"\\.|&#\d+;", "", shown))
    span = code(text)
    ticks = re.match("`+", span)
    assert ticks is not None
    assert span.endswith(ticks[0])
    assert ticks[0] not in span[len(ticks[0]) : -len(ticks[0])]
    block = fenced(text)
    fence = block.partition("text\n")[0]
    lines = block.split("\n")
    assert [line for line in lines if line.strip() == fence] == [fence]
    assert "<!-- peft_dynamic" not in block
    assert eval(literal(text)) == text.replace("\x1b", "").replace("\u202e", "").replace("\ud800", "?")
    assert "\n" not in literal(text)
    for made in (shown, span, block, literal(text)):
        made.encode("utf-8")
        assert "\x1b" not in made
        assert "\u202e" not in made


def test_text_by_hand() -> None:
    assert inline("a_b|c <d> & `e`") == r"a\_b\|c &lt;d&gt; &amp; \`e\`"
    assert inline("https://x.y") == "https:&#47;&#47;x.y"
    assert code("a`b") == "``a`b``"
    assert code("`") == "`` ` ``"
    assert fenced("a\n````\nb", "python") == "`````python\na\n````\nb\n`````"
    assert literal('a"b\n') == '"a\\"b\\n"'
    assert one_line("x" * 400) == "x" * 297 + "..."
    assert one_line("  a\n\tb  ") == "a b"
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n|---|---:|\n| 1 | 2 |"


def saved(folder: Path, **settings: Any) -> Path:
    settings = {"r": 8, "ranks": [2, 4, 8], "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | settings
    DyLoRAConfig(**settings).save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("text", NASTY)
def test_nothing_foreign_breaks_out_of_a_card(tmp_path: Path, text: str) -> None:
    saved(tmp_path, base_model_name_or_path=text)
    facts = CardFacts(
        settings=[(text, text)],
        columns=["rank", text],
        rows=[["2", text]],
        recommended=2,
        results=[(text, 0.5)],
        results_rank=2,
        samples=[text, f"before\n{text}\nafter"],
        twins=[Twin(2, "rank-2", ("vllm", "llama.cpp"))],
    )
    for _ in range(2):
        write_model_card(tmp_path, text or None, facts)
        card = ModelCard.load(tmp_path / "README.md")
        (tmp_path / "README.md").write_text(str(card) + "\n\nMine.\n", encoding="utf-8")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.text.count("<!-- peft_dynamic: usage -->") == 1
    assert card.text.count("<!-- peft_dynamic: end of usage -->") == 1
    assert card.text.count("Mine.") == 2  # as the user wrote it, twice
    assert card.data.to_dict().keys() <= {"library_name", "tags", "model-index", "pipeline_tag", "base_model"}
    assert card.data.license is None
    without_code = re.sub(r"^(`{3,})\w*\n.*?^\1$", "", card.text, flags=re.MULTILINE | re.DOTALL)
    assert "<script" not in without_code
    links = re.findall(r"\]\(([^)]*)\)", re.sub(r"\\.", "", without_code))
    assert all(link.startswith("https://arxiv.org/") for link in links)
    headings = re.findall(r"^#+ .*$", without_code, flags=re.MULTILINE)
    assert len(headings) == 8
    for block in re.findall(r"^```python\n(.*?)^```$", card.text, flags=re.MULTILINE | re.DOTALL):
        compile(block, "card", "exec")


@pytest.mark.parametrize("name", ["os.system", "x; import os", "Own\nimport os", "a-b", "Üx"])
def test_the_class_of_a_stranger_is_no_code(tmp_path: Path, name: str) -> None:
    LoraConfig(r=2).save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    mapping = {"base_model_class": name, "parent_library": "transformers"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_mapping": mapping, "peft_type": "<b>|"}))
    text = write_model_card(tmp_path).read_text(encoding="utf-8")
    block = text.partition("```python\n")[2].partition("```")[0]
    compile(block, "card", "exec")
    assert ("import os" in block) is False
    assert "<b>" not in ModelCard(text).text


RUN = {
    "run": {
        "model": {"name": "/home/alice/models/x", "files": {"model.safetensors": 1}},
        "adapter": {
            "peft_type": "DYLORA",
            "r": 8,
            "ranks": [2, 4, 8],
            "lora_alpha": 16,
            "target_modules": "all-linear",
        },
        "training": {"steps": None, "epochs": 3.0, "batch_size": 8, "learning_rate": 5e-05, "seed": 0, "4bit": False},
        "data": {"source": "/home/alice/secret.jsonl", "rows": 90, "held_out_rows": 10, "sha256": "ab" * 32},
        "hub_token": "hf_s3cretS3cret",
    },
    "versions": {"torch": "2.13.0+cpu", "peft_dynamic": "0.1.0.dev0", "bitsandbytes": None},
    "dtype": "float32",
    "scaling": "/home/alice",
}
REPORT = """# One training run

## What was not used

```text
not a sample
```

## Samples

```text
Say one.

[rank 4] one!
## Use it
```

````text
A fence: ```

[rank 4] ```
````

## Use it

```python
model = "/home/alice/out"
```

```text
not one either
```
"""


def run_folder(folder: Path) -> Path:
    """As `peft-dynamic train` leaves it, with an adapter of real tensors."""
    DyLoRAConfig(r=8, ranks=[2, 4, 8], target_modules=["a"], task_type="CAUSAL_LM").save_pretrained(folder / "adapter")
    place = "base_model.model.a"
    factors = {f"{place}.lora_A.weight": torch.randn(8, 16), f"{place}.lora_B.weight": torch.randn(16, 8)}
    factors[f"{place}.lora_schedule.step"] = torch.tensor(3)
    save_file(factors, folder / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
    LoraConfig(r=4, task_type="CAUSAL_LM").save_pretrained(str(folder / "lora"))
    (folder / "run.yaml").write_text(json.dumps(RUN))
    (folder / "report.md").write_text(REPORT)
    (folder / "curve.png").write_bytes(b"a picture")
    rows = [RankRow(None, {"loss": 2.0, "a|b": 1.0}), RankRow(2, {"loss": 1.5}), RankRow(4, {"loss": 1.0, "a|b": 3.0})]
    RankCurve([*rows, RankRow(8, {"loss": 0.99})]).to_json(folder / "curve.json")
    return folder


def test_the_card_of_a_run(tmp_path: Path) -> None:
    run_folder(tmp_path)
    path, facts = write_card(tmp_path, "me/poet", license="apache-2.0", base_model="you/base")
    assert path == tmp_path / "adapter" / "README.md"
    card = ModelCard.load(path)
    assert (tmp_path / "adapter" / "curve.png").read_bytes() == b"a picture"
    assert "![what each rank is worth](curve.png)" in card.text
    assert facts.recommended == 4  # the run's own choice, in lora/
    assert "Rank 4 is the smallest that is good enough." in card.text
    assert "| base | 2 | 1 |\n| 2 | 1.5 |  |\n| 4 | 1 | 3 |\n| 8 | 0.99 |  |" in card.text
    assert "| rank | loss | a\\|b |" in card.text
    for line in ("| learning\\_rate | 5e-05 |", "| ranks | 2, 4, 8 |", "| 4bit | no |", "| torch | 2.13.0\\+cpu |"):
        assert line in card.text
    assert "Say one.\n\n[rank 4] one!\n## Use it" in card.text
    assert "````text\nA fence: ```" in card.text
    assert card.text.count("not a sample") + card.text.count("not one either") == 0
    for private in ("alice", "secret", "hf_", "ab" * 32):
        assert private not in str(card)
    assert card.data.base_model == "you/base"
    assert card.data.license == "apache-2.0"
    assert card.data.pipeline_tag == "text-generation"
    results = {each.metric_name: each.metric_value for each in card.data.eval_results}
    assert results == {"loss (rank 4)": 1.0, "a|b (rank 4)": 3.0}
    (found,) = yaml.safe_load(str(card).split("---")[1])["model-index"]
    assert (found["name"], found["results"][0]["task"]["type"]) == ("poet", "text-generation")
    path, facts = write_card(tmp_path, "me/poet", samples=False)
    assert "## Samples" not in path.read_text()
    again = ModelCard.load(path).data
    assert len(again.eval_results) == 2  # in the place of the earlier ones
    assert again.license == "apache-2.0"


def test_own_results_of_a_user_stay_beside_ours(tmp_path: Path) -> None:
    run_folder(tmp_path)
    index = [{"name": "mine", "results": [{"task": {"type": "t"}, "dataset": {"type": "d", "name": "d"},
              "metrics": [{"type": "bleu", "value": 7.0, "name": "BLEU"}]}]}]  # fmt: skip
    (tmp_path / "adapter" / "README.md").write_text(f"---\nmodel-index: {json.dumps(index)}\n---\n")
    for _ in range(2):
        path, _ = write_card(tmp_path)
    data = ModelCard.load(path).data
    assert data.model_name == "mine"
    assert [each.metric_name for each in data.eval_results] == ["BLEU", "loss (rank 4)", "a|b (rank 4)"]


def test_a_curve_that_is_given_is_drawn_and_chosen_from(tmp_path: Path) -> None:
    run_folder(tmp_path)
    (tmp_path / "lora" / "adapter_config.json").unlink()
    curve = RankCurve([RankRow(None, {"accuracy": 0.5}), RankRow(2, {"accuracy": 0.9}), RankRow(8, {"accuracy": 0.9})])
    path, facts = write_card(tmp_path / "adapter", curve=curve, samples=["Q: a?\nA: b."])
    assert (facts.recommended, facts.results) == (2, [("accuracy", 0.9)])
    assert path.with_name("curve.png").read_bytes().startswith(b"\x89PNG")
    assert "```text\nQ: a?\nA: b.\n```" in path.read_text()


@pytest.mark.parametrize(
    ("source", "expected"),
    [("me/poems", "me/poems"), ("my.jsonl", None), ("data/my.jsonl", None), ("./poems", None), ("a/b/c", None)],
)
def test_data_are_named_if_others_can_find_them(tmp_path: Path, source: str, expected: str | None) -> None:
    run_folder(tmp_path)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"sft": {"dataset_name": source, "learning_rate": 0.1}}))
    path, facts = write_card(tmp_path)
    data = ModelCard.load(path).data
    assert (facts.dataset, data.datasets) == (expected, None if expected is None else [expected])
    assert "| learning\\_rate | 0.1 |" in path.read_text()


def test_a_folder_on_this_machine_is_no_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_folder(tmp_path / "run")
    (tmp_path / "me" / "poems").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "run.yaml").write_text('{"source": "me/poems"}')
    assert write_card("run")[1].dataset is None


def test_the_base_models_licence_is_told_and_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_folder(tmp_path)
    (tmp_path / "base.md").write_text("---\nlicense: gemma\n---\n")
    monkeypatch.setattr("peft_dynamic.hub.known.try_to_load_from_cache", lambda *a: str(tmp_path / "base.md"))
    path, _ = write_card(tmp_path, base_model="you/base")
    assert "Its licence, by its own card, is `gemma`." in path.read_text()
    assert ModelCard.load(path).data.license is None
    (tmp_path / "base.md").write_text("---\nlicense: '`x`'\n---\n")
    assert write_card(tmp_path, base_model="you/base")[1].base_license is None


def test_damaged_files_are_named(tmp_path: Path) -> None:
    run_folder(tmp_path)
    (tmp_path / "run.yaml").write_text("a: [1")
    with pytest.raises(ValueError, match=r"run\.yaml is no YAML"):
        write_card(tmp_path)
    (tmp_path / "run.yaml").write_text("just words")
    (tmp_path / "curve.json").write_text("{}")
    with pytest.raises(ValueError, match="is no rank curve"):
        write_card(tmp_path)
    (tmp_path / "curve.json").unlink()
    assert "## Training" not in write_card(tmp_path)[0].read_text()
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config\.json, and no folder `adapter`"):
        write_card(tmp_path / "nowhere")


def test_samples_of_a_report() -> None:
    assert samples_of(REPORT) == ["Say one.\n\n[rank 4] one!\n## Use it", "A fence: ```\n\n[rank 4] ```"]
    assert samples_of("## Samples\n\nnone\n\n## Use it\n\n```text\nx\n```\n") == []
    assert samples_of("") == []


def test_other_programs_get_their_commands(tmp_path: Path) -> None:
    saved(tmp_path, base_model_name_or_path="you/base")
    facts = CardFacts(twins=[Twin(4, "rank-4", ("vllm", "llama.cpp")), Twin(8, "rank-8")], recommended=8)
    text = write_model_card(tmp_path, "me/poet", facts).read_text()
    assert "hf download me/poet --include 'rank-4/*' --local-dir poet\n" in text
    assert "vllm serve you/base --enable-lora --max-lora-rank 8 --lora-modules poet=poet/rank-4\n" in text
    assert "python convert_lora_to_gguf.py poet/rank-4 --base base --outfile poet-rank-4.gguf\n" in text
    assert "FROM ./base.gguf\nADAPTER ./poet-rank-4.gguf\n" in text
    assert "diffusers" not in text
    text = write_model_card(tmp_path, "me/poet", CardFacts(twins=[Twin(8, "rank-8")])).read_text()
    assert "vllm" not in text
    assert "llama" not in text
    noted = {"base_model_class": "UNet2DConditionModel", "parent_library": "diffusers.models.unets"}
    saved(tmp_path / "unet", task_type=None)
    path = tmp_path / "unet" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_mapping": noted}))
    text = write_model_card(tmp_path / "unet", "me/art", facts).read_text()
    assert 'pipeline.unet = PeftModel.from_pretrained(pipeline.unet, "me/art", subfolder="rank-8")' in text
    assert "vllm" not in text


def test_cards_need_no_torch_of_their_own() -> None:
    assert "peft_dynamic.cards" in sys.modules
    source = "".join(path.read_text() for path in Path(sys.modules["peft_dynamic.cards"].__file__).parent.glob("*.py"))
    assert not re.search(r"^(import|from) (torch|peft)\b", source, flags=re.MULTILINE)
