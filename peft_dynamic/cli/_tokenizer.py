"""The tokenizer and the chat template that belong to an adapter: its own, or else its base model's, as files."""

from __future__ import annotations

from pathlib import Path

PATTERNS = [
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "spiece.model"),
    *("sentencepiece.bpe.model", "*.jinja", "chat_template*"),
]


def tokenizer_files(adapter: Path, base: str | None) -> list[Path]:
    """The files to copy: all of the adapter's, or all of the base model's with the adapter's own chat template.

    A base model that is a name is looked for in the cache alone.
    """
    own = _files(adapter)
    if any(path.name in ("tokenizer_config.json", "tokenizer.json") for path in own):
        return own
    folder = None if base is None else base_folder(base)
    found = {path.name: path for path in ([] if folder is None else _files(folder))}
    return [*(found | {path.name: path for path in own}).values()]


def base_folder(base: str, patterns: list[str] = PATTERNS) -> Path | None:
    """Where the base model's files are: its folder, or its place in the cache of the Hub; None if it is not here."""
    folder = Path(base).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(base, allow_patterns=patterns, local_files_only=True))
    except (OSError, ValueError):  # of the Hub's errors too
        return None


def _files(folder: Path) -> list[Path]:
    found = {path for pattern in PATTERNS for path in folder.glob(pattern) if path.is_file()}
    return sorted(found)
