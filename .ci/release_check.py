"""Whether this tree can be released under a tag: `python .ci/release_check.py v0.1.0`; without one, the tag of HEAD.

The version stands in peft_dynamic/__init__.py, so that an sdist and a shallow clone know it without git.
"""

import re
import subprocess
import sys
import tomllib
from pathlib import Path


def read(root: Path, file: str, pattern: str) -> str:
    """What the group of a pattern matches in a file, or nothing."""
    found = re.search(pattern, (root / file).read_text(encoding="utf-8"), re.M)
    return found[1] if found else ""


def problems(root: Path, tag: str) -> list[str]:
    """What has to be mended before the tag may be released."""
    version = read(root, "peft_dynamic/__init__.py", r'^__version__ = "(.+)"$')
    dated = read(root, "CHANGELOG.md", rf"^## \[{re.escape(version)}\] - (\d{{4}}-\d\d-\d\d)$")
    urls = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
    found = []
    if tag != f"v{version}":
        found.append(f"the tag is {tag or 'missing'}, and __version__ in peft_dynamic/__init__.py is {version}")
    if not re.fullmatch(r"\d+\.\d+\.\d+(rc\d+)?", version):
        found.append(f"__version__ {version} is no release: 1.2.3 or 1.2.3rc1")
    if not dated:
        found.append(f"CHANGELOG.md has no heading `## [{version}] - YYYY-MM-DD`")
    if read(root, "CITATION.cff", r"^version: (.+)$") != version:
        found.append(f"CITATION.cff has another version than {version}")
    if dated and read(root, "CITATION.cff", r"^date-released: (.+)$") != dated:
        found.append(f"CITATION.cff has another date-released than CHANGELOG.md, {dated}")
    found += [
        f"pyproject.toml: OWNER is to be filled in, in {name} = {url!r}" for name, url in urls.items() if "OWNER" in url
    ]
    return found


def tag_of_head(root: Path) -> str:
    """The tag of the commit that is checked out, if it has one."""
    command = ["git", "describe", "--tags", "--exact-match", "HEAD"]
    return subprocess.run(command, cwd=root, capture_output=True, text=True).stdout.strip()


def main() -> None:
    """Print what is wrong, and fail if anything is."""
    root = Path(__file__).parents[1]
    tag = sys.argv[1] if sys.argv[1:] else tag_of_head(root)
    found = problems(root, tag)
    print(*found or [f"{tag} can be released"], sep="\n")
    raise SystemExit(bool(found))


if __name__ == "__main__":
    main()
