"""The Markdown pages as HTML: links go to pages, to the API reference where they are to code, or to copies of files."""

from __future__ import annotations

import html
import os
import re
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token
from reference import page_of

PAGES = ("README.md", "CHANGELOG.md", "certs/README.md", "docs/*.md")

_FRAME = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
pre, code {{ font-family: monospace; background: #f4f4f4 }}
pre {{ padding: .7rem; overflow-x: auto }}
table {{ border-collapse: collapse; display: block; overflow-x: auto }}
td, th {{ border: 1px solid #ccc; padding: .2rem .5rem; vertical-align: top }}
img {{ max-width: 100% }}
nav {{ border-bottom: 1px solid #ccc; padding-bottom: .5rem }}
</style>
<nav><a href="{home}">pfedsecure</a> · <a href="{reference}">API reference</a></nav>
{body}
</html>
"""


def files(root: Path) -> list[Path]:
    return sorted(file for pattern in PAGES for file in root.glob(pattern))


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def anchors(tokens: list[Token]) -> Iterator[tuple[Token, str]]:
    """Each heading's opening token, with its anchor."""
    seen: dict[str, int] = {}
    for token, inline in pairwise(tokens):
        if token.type == "heading_open":
            text = "".join(part.content for part in inline.children or () if part.type in ("text", "code_inline"))
            name = slug(text)
            number = seen.get(name, 0)
            seen[name] = number + 1
            yield token, f"{name}-{number}" if number else name


def target_of(page: Path, root: Path) -> Path:
    """Where a page goes, relative to the folder that is built."""
    relative = page.relative_to(root)
    return Path("index.html") if relative == Path("README.md") else relative.with_suffix(".html")


def write(root: Path, out: Path) -> list[str]:
    """All pages, and the files that they link to. What is wrong, in words."""
    return [problem for page in files(root) for problem in _Page(page, root, out).write()]


class _Page:
    def __init__(self, file: Path, root: Path, out: Path) -> None:
        self._file, self._root, self._out = file, root, out
        self._target = target_of(file, root)
        self._problems: list[str] = []

    def write(self) -> list[str]:
        markdown = MarkdownIt("commonmark").enable("table")
        tokens = markdown.parse(self._file.read_text())
        for token, name in anchors(tokens):
            token.attrSet("id", name)
        for token in tokens:
            token.children = None if token.children is None else list(self._linked(token.children))
        title = next((token.content for token in tokens if token.type == "inline"), self._file.stem)
        page = _FRAME.format(
            title=html.escape(title.replace("`", "")),
            home=self._from_here(Path("index.html")),
            reference=self._from_here(page_of("index")),
            body=markdown.renderer.render(tokens, markdown.options, {}),
        )
        file = self._out / self._target
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(page)
        return self._problems

    def _linked(self, parts: list[Token]) -> Iterator[Token]:
        inside = False
        for part in parts:
            for attribute in ("href", "src"):
                if isinstance(link := part.attrGet(attribute), str):
                    part.attrSet(attribute, self._link(link))
            inside = {"link_open": True, "link_close": False}.get(part.type, inside)
            code = part.type == "code_inline" and not inside and (self._code(part.content))
            if code:
                yield Token("link_open", "a", 1, attrs={"href": self._from_here(code)})
            yield part
            if code:
                yield Token("link_close", "a", -1)

    def _code(self, text: str) -> Path | None:
        """The page of the reference for a file of code that is named in running text."""
        if not re.fullmatch(r"(pfedsecure|server/pfed_server|client/pfed_client)/[\w/]+\.py", text):
            return None
        if not (self._root / text).is_file():
            self._problems.append(f"{self._file.relative_to(self._root)}: {text} does not exist")
            return None
        return page_of(text)

    def _link(self, link: str) -> str:
        if re.match(r"[a-z]+:", link):
            return link
        path, mark, anchor = link.partition("#")
        if not path:
            return link
        found = (self._file.parent / path).resolve()
        if not found.is_relative_to(self._root) or not found.exists():
            self._problems.append(f"{self._file.relative_to(self._root)}: the link {link} leads nowhere")
            return link
        if found in files(self._root):
            return self._from_here(target_of(found, self._root)) + mark + anchor
        relative = found.relative_to(self._root)
        return self._from_here(page_of(str(relative)) or self._copied(found, relative))

    def _copied(self, found: Path, relative: Path) -> Path:
        """A file as it is; of a folder its files, and a page that lists them."""
        if found.is_file():
            (self._out / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(found, self._out / relative)
            return relative
        inside = sorted(file for file in found.iterdir() if file.is_file())
        for file in inside:
            self._copied(file, file.relative_to(self._root))
        items = "".join(f'<li><a href="{file.name}">{file.name}</a></li>' for file in inside)
        listing = relative / "index.html"
        depth = "../" * len(relative.parts)
        (self._out / listing).write_text(
            _FRAME.format(
                title=relative,
                home=f"{depth}index.html",
                reference=f"{depth}{page_of('index')}",
                body=f"<h1>{relative}</h1><ul>{items}</ul>",
            )
        )
        return listing

    def _from_here(self, target: Path | None) -> str:
        assert target is not None
        return os.path.relpath(target, self._target.parent)
