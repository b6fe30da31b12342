"""The API reference: docstrings and signatures of what both sides share, of the server and of the client, by pdoc."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pdoc.doc
import pdoc.render

import pfedsecure.wire.grpc_settings  # noqa: F401 - before gRPC is imported by what is documented

FOLDER = "reference"
PACKAGES = {"pfedsecure": "pfedsecure", "pfed_server": "server/pfed_server", "pfed_client": "client/pfed_client"}
LEFT_OUT = (
    "wire/v1",  # generated from proto/
    "migrations/env.py",  # run by Alembic, not imported
    "migrations/versions",
    "__main__.py",
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


def modules(root: Path) -> list[str]:
    """Names of all modules, also of those that their package does not give out again."""
    names = []
    for package, folder in PACKAGES.items():
        for file in sorted((root / folder).rglob("*.py")):
            inside = file.relative_to(root / folder)
            if not any(inside.is_relative_to(left) or inside.name == left or inside.match(left) for left in LEFT_OUT):
                parts = inside.with_suffix("").parts
                names.append(".".join((package, *(parts[:-1] if parts[-1] == "__init__" else parts))))
    return names


def write(root: Path, out: Path) -> None:
    """All of it, below `out`. What a docstring says of a page of docs/ becomes a link to it."""
    import grpc

    # Generic in the stubs that mypy reads, not when it runs; pdoc evaluates annotations.
    grpc.RpcMethodHandler.__class_getitem__ = classmethod(lambda cls, _parameters: cls)
    pdoc.render.configure(docformat="markdown", show_source=False)
    names = modules(root)
    shown = {name: pdoc.doc.Module.from_name(name) for name in names}
    for name, module in shown.items():
        # pdoc would import what is left out, and leave out what a package does not give out again.
        inside = [other for other in names if other.rpartition(".")[0] == name]
        module.__dict__["submodules"] = [shown[other] for other in inside]
    pages = {f"{name.replace('.', '/')}.html": pdoc.render.html_module(module, shown) for name, module in shown.items()}
    pages["index.html"] = pdoc.render.html_index(shown)
    for page, text in pages.items():
        file = out / page
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(_finished(text, os.path.relpath(out.parent, file.parent)))
    (out / "search.js").write_text(pdoc.render.search_index(shown))


def _finished(text: str, home: str) -> str:
    """A page of pdoc's with links to ours, and without its links to private names, which it does not show."""
    ids = set(re.findall(r'\bid="([^"]+)"', text))
    text = re.sub(
        r'<a [^>]*href="#([^"]+)"[^>]*>(.*?)</a>', lambda match: match[0] if match[1] in ids else match[2], text
    )
    text = re.sub(r"(?<!/)\b(docs/[\w-]+|certs/README)\.md\b", rf'<a href="{home}/\1.html">\g<0></a>', text)
    return re.sub(r"(<main[^>]*>)", rf'\1<p><a href="{home}/index.html">pages</a></p>', text, count=1)
