"""The site is the repository: pages keep their places, so that a link works on GitHub and on the site alike.

MkDocs loads this file as a hook (mkdocs.yml). It takes the Markdown of the README, docs/ and benchmarks/ where it lies,
and adds each file that a page links to: pictures as they are, sources and notebooks as pages that show them.
"""

import ast
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "RELEASING.md", "docs/**/*.md", "benchmarks/**/*.md")
STUDIES = "benchmarks/*/README.md"  # in the nav of mkdocs.yml
LINK = re.compile(r"(?<=\]\()([^()\s#]+)(?=[)#])")
NOT_FROM_DOCS = (".md", ".py", ".svg", ".ipynb")  # what lies in docs/ is added with the folder in its address
STUBBED = re.compile(r"^::: (peft_dynamic|peft_dynamic\.trainers)$", re.M)
LANGUAGES = {".py": "python", ".sh": "bash", ".yaml": "yaml"}
SHOWN = {*LANGUAGES, ".ipynb"}  # as pages


def linked(page: Path) -> set[Path]:
    """The files of the repository, other than pages, that a page links to."""
    targets = (page.parent / link for link in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in link)
    return {path.resolve() for path in targets if path.is_file() and path.suffix != ".md"}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The studies' pages in the navigation, in the place of their pattern."""
    for section in config.nav or []:
        for pages in section.values() if isinstance(section, dict) else ():
            if isinstance(pages, list) and STUDIES in pages:
                pages.remove(STUDIES)
                pages += sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob(STUDIES))
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """The repository's pages in the place of docs/ alone, and what they link to."""
    pages = sorted({path for pattern in PAGES for path in ROOT.glob(pattern)})
    others = sorted(set().union(*map(linked, pages)))

    def file(path: Path) -> File:
        return File(path.relative_to(ROOT).as_posix(), str(ROOT), config.site_dir, config.use_directory_urls)

    def source(path: Path) -> File:
        name = path.relative_to(ROOT).as_posix()
        head = f"---\nsearch:\n  exclude: true\n---\n\n# {name}\n\n"
        text = f"{head}````{LANGUAGES[path.suffix]}\n{path.read_text(encoding='utf-8')}````\n"
        return File.generated(config, f"{name}.md", content=text)

    def notebook(path: Path) -> list[File]:
        """As it was run: nothing is executed here."""
        name, folder = (each.relative_to(ROOT).as_posix() for each in (path, path.parent))
        text, found = MarkdownExporter().from_filename(str(path), resources={"unique_key": path.stem})
        title, _, rest = text.lstrip().partition("\n")
        download = f'<a href="{path.name}" download>Download this notebook</a>'
        shown = {f"{name}.md": f"{title}\n\n{download}\n{rest}"}
        shown |= {f"{folder}/{picture}": data for picture, data in found["outputs"].items()}
        return [file(path), *(File.generated(config, uri, content=content) for uri, content in shown.items())]

    theme = [each for each in files if each.generated_by or not each.src_uri.endswith(NOT_FROM_DOCS)]
    shown = [source(path) if path.suffix in LANGUAGES else file(path) for path in others if path.suffix != ".ipynb"]
    run = [each for path in others if path.suffix == ".ipynb" for each in notebook(path)]
    return Files([*theme, *map(file, pages), *shown, *run])


def names(module: str) -> list[str]:
    """The public names of a package, out of its stub: the package itself makes its `__all__` when it is imported."""
    stub = ast.parse((ROOT / module.replace(".", "/") / "__init__.pyi").read_text(encoding="utf-8"))
    return [alias.name for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names]


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to sources lead to the pages that show them, and packages with a stub show the names in it."""
    with_names = STUBBED.sub(lambda line: f"{line[0]}\n    options:\n      members: {names(line[1])}", markdown)
    return LINK.sub(lambda link: f"{link[0]}.md" if Path(link[0]).suffix in SHOWN else link[0], with_names)
