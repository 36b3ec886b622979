"""What the site takes from outside docs/: the README as its first page, the changes."""

import pathlib

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = pathlib.Path(__file__).parent.parent
PAGES = {"index.md": "README.md", "changes.md": "CHANGELOG.md"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages, with links as they are from within docs/."""
    for page, source in PAGES.items():
        text = (ROOT / source).read_text().replace("](docs/", "](")
        files.append(File.generated(config, page, content=text))
    citation = str(ROOT / "CITATION.cff")
    files.append(File.generated(config, "CITATION.cff", abs_src_path=citation))
    return files
