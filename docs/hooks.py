"""What the site takes from outside docs/: the README as its first page, the changes."""

import pathlib
import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = pathlib.Path(__file__).parent.parent
PAGES = {"index.md": "README.md", "changes.md": "CHANGELOG.md"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages, with links as they are from within docs/."""
    for page, source in PAGES.items():
        text = (ROOT / source).read_text().replace("](docs/", "](")
        files.append(File.generated(config, page, content=text))
    notebooks = sorted((ROOT / "examples").glob("*.ipynb"))
    for path in (ROOT / "CITATION.cff", *notebooks):
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(
    markdown: str, page: Page, config: MkDocsConfig, files: Files
) -> str:
    """Links to the README lead to the first page."""
    return re.sub(r"\]\(((?:\.\./)*)\.\./README\.md", r"](\1index.md", markdown)
