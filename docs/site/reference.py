"""The API reference: docstrings and signatures of what both sides share, of the server and of the client, by pdoc."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pdoc
import pdoc.doc
import pdoc.extract
import pdoc.render

FOLDER = "reference"
PACKAGES = {"pfedsecure": "pfedsecure", "pfed_server": "server/pfed_server", "pfed_client": "client/pfed_client"}
LEFT_OUT = (
    r"!pfedsecure\.wire\.v1",  # generated from proto/
    r"!pfed_server\.migrations\.(env|versions)",  # run by Alembic, not imported
    r"!.*\.__main__",
)


def page_of(name: str) -> Path | None:
    """Where the reference has a file or a folder of code, relative to the folder that is built; None for others."""
    if name == "index":
        return Path(FOLDER, "index.html")
    for package, folder in PACKAGES.items():
        if name == folder or name.startswith(f"{folder}/"):
            module = package + name.removeprefix(folder).removesuffix(".py").removesuffix("/__init__")
            return Path(FOLDER, f"{module}.html")
    return None


def write(root: Path, out: Path) -> None:
    """All of it, below `out`. What a docstring says of a page of docs/ becomes a link to it."""
    pdoc.render.configure(docformat="markdown", show_source=False)
    pdoc.pdoc(*PACKAGES, *LEFT_OUT, output_directory=out)
    for file in out.rglob("*.html"):
        home = os.path.relpath(out.parent, file.parent)
        text = re.sub(
            r"(?<!/)\b(docs/[\w-]+|certs/README)\.md\b",
            lambda match, home=home: f'<a href="{home}/{match[1]}.html">{match[0]}</a>',
            file.read_text(),
        )
        file.write_text(re.sub(r"(<main[^>]*>)", rf'\1<p><a href="{home}/index.html">pages</a></p>', text, count=1))
