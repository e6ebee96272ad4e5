"""Writes docs/methods.md from the table in peft_dynamic/methods.py; with --check, says whether it is up to date."""

import sys
from pathlib import Path

from peft_dynamic.methods import METHODS, REFUSED, Method

PAGE = Path(__file__).parent / "methods.md"


def _methods() -> list[str]:
    lines = [
        "| method | configuration | what it is | paper | ranks | an export is read by |",
        "|---|---|---|---|---|---|",
    ]
    for method in METHODS.values():
        authors, number = method.paper
        cells = (
            f"[{method.title}]({method.page})",
            f"`{method.classes[0]}`",
            method.summary,
            f"[{authors}](https://arxiv.org/abs/{number})",
            "many, from one run" if method.ranked else "one",
            ", ".join(method.engines) or f"nothing: it is made of {method.not_lora}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _refused() -> list[str]:
    groups: dict[str, list[Method]] = {}  # methods that refuse the same
    for method in METHODS.values():
        if method.refused:
            groups.setdefault(method.like or method.name, []).append(method)
    titles = [", ".join(method.title for method in group) for group in groups.values()]
    lines = [f"| field | {' | '.join(titles)} |", "|---" * (len(groups) + 1) + "|"]
    for field, reasons in REFUSED.items():
        cells = [f"refused: {reasons[name]}" if name in reasons else "works" for name in groups]
        lines.append(f"| `{field}` | {' | '.join(cells)} |")
    return lines


def page() -> str:
    """The page."""
    return "\n".join(
        [
            "# Methods",
            "",
            "<!-- Made by docs/make_methods.py from peft_dynamic/methods.py: change the table there. -->",
            "",
            *_methods(),
            "",
            "## Fields of `LoraConfig` that a method refuses",
            "",
            "Every other field of PEFT's `LoraConfig` works as in LoRA, but for what a method's page says. A field",
            "or a variant of LoRA that a newer PEFT has is refused by every method, until a row here allows it.",
            "LoRETTA_adp has none of these fields.",
            "",
            *_refused(),
            "",
        ]
    )


if __name__ == "__main__":
    if "--check" not in sys.argv:
        PAGE.write_text(page(), encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != page():
        raise SystemExit("docs/methods.md is out of date: run python docs/make_methods.py")
