"""Which programs read our adapters, and the test that says so; docs/engines.md is made of it.

    python -m tests.engine_support

writes the page.
"""

import ast
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "engines.md"
REAL = "by the program itself, in every run of the tests"
INSTALLED = "by the program itself, where it is installed: the extra `test` brings it"
RESTATED = "by its loader's rules, restated in our tests"
UNTESTED = "not tested"


class Support(NamedTuple):
    """A row: the program, what it is given, how that is tested, by which tests, and the package that they run.

    `package` is a name of constraints.txt, whose version is tested.
    """

    program: str
    given: str
    how: str
    nodes: tuple[str, ...] = ()
    package: str = ""


ENGINES = (
    Support(
        "PEFT",
        'any adapter with `import peft_dynamic`; without it an export, or a twin by `subfolder="rank-4"`',
        REAL,
        (
            "tests/test_export.py::test_stock_peft_computes_the_same_bits",
            "tests/test_push.py::test_strangers_pull_by_name_and_get_equal_logits",
        ),
        "peft",
    ),
    Support(
        "transformers",
        'an export by `model.load_adapter`, or a twin with `adapter_kwargs={"subfolder": "rank-4"}`',
        REAL,
        (
            "tests/test_engines.py::test_transformers_own_load_adapter_computes_the_adapter",
            "tests/test_engines.py::test_transformers_own_load_adapter_takes_a_twin_by_its_folder",
        ),
        "transformers",
    ),
    Support(
        "vLLM",
        'an export with `engine="vllm"`',
        RESTATED,
        (
            "tests/test_engines.py::test_an_engine_without_patterns_computes_the_adapter",
            "tests/test_engines.py::test_vllms_own_checks_refuse_what_we_refuse_to_write",
        ),
    ),
    Support(
        "llama.cpp",
        'a GGUF file of `peft-dynamic export --gguf`, or an export with `engine="llama.cpp"` through its converter',
        INSTALLED,
        ("tests/cli/test_gguf.py::test_llama_cpp_computes_what_peft_does_token_by_token",),
        "xllamacpp",
    ),
    Support("Ollama", "the GGUF files of llama.cpp, by the `Modelfile` on the card", UNTESTED),
    Support(
        "sentence-transformers",
        'an export by `model.load_adapter`, or a twin with `adapter_kwargs={"subfolder": "rank-4"}`',
        INSTALLED,
        ("tests/test_other_libraries.py::test_sentence_transformers_takes_an_export_and_a_twin",),
        "sentence-transformers",
    ),
    Support(
        "diffusers",
        "a file of PEFT's `get_peft_model_state_dict(unet)` by `unet.load_lora_adapter`, or a twin by `PeftModel`; not "
        "what `unet.save_lora_adapter` writes of an adapter of ours",
        INSTALLED,
        (
            "tests/test_other_libraries.py::test_diffusers_own_loader_computes_the_adapter_of_a_unet",
            "tests/test_other_libraries.py::test_a_unet_takes_a_twin_as_the_card_says",
        ),
        "diffusers",
    ),
)


def decorators(node: str) -> str:
    """The decorators of a test, as they are written.

    Raises:
        LookupError: there is no such test.
    """
    file, _, name = node.partition("::")
    for each in ast.parse((ROOT / file).read_text(encoding="utf-8")).body:
        if isinstance(each, ast.FunctionDef) and each.name == name:
            return " ".join(ast.unparse(decorator) for decorator in each.decorator_list)
    raise LookupError(node)


def version(row: Support) -> str:
    """What is tested, as constraints.txt pins it; "" where no package is.

    Raises:
        LookupError: it is not pinned there.
    """
    if not row.package:
        return ""
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = [pin.partition("==")[2] for pin in pins if pin.partition("==")[0] == row.package]
    if not found:
        raise LookupError(row.package)
    return f"{row.package} {found[0]}"


def page() -> str:
    """The page."""
    lines = [
        "# Which programs read an adapter",
        "",
        "<!-- Made by python -m tests.engine_support from the table there: change it there. -->",
        "",
        "| program | is given | tested | version | tests |",
        "|---|---|---|---|---|",
    ]
    for row in ENGINES:
        tests = ", ".join(f"[`{node.partition('::')[2]}`](../{node.partition('::')[0]})" for node in row.nodes)
        lines.append(f"| {row.program} | {row.given} | {row.how} | {version(row)} | {tests} |")
    lines += [
        "",
        "The logits, or the tokens, are compared with those of our adapter at that rank. vLLM's rules are in",
        "[tests/vllm_loader.py](../tests/vllm_loader.py), with the files of vLLM that they were read in. An export",
        "refuses what a program would drop or read as something else, and says what to do instead. Start vLLM with",
        "`--max-lora-rank` at the rank or above.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
