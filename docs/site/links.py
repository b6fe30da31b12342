"""Whether every link of a built folder leads to a page and an anchor that are in it."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class _Marks(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.ids: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.ids.add(value)
            elif name in ("href", "src") and value:
                self.links.add(value)


def broken(folder: Path) -> list[str]:
    """What is wrong, in words. Links to other sites are left alone: this works without a network."""
    marks: dict[Path, _Marks] = {}
    for page in sorted(folder.rglob("*.html")):
        marks[page] = _Marks()
        marks[page].feed(page.read_text())
    problems = []
    for page, found in marks.items():
        for link in sorted(found.links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            anchor = unquote(parts.fragment)
            if not target.is_file():
                problems.append(f"{page.relative_to(folder)}: the link {link} leads nowhere")
            elif anchor and target in marks and anchor not in marks[target].ids:
                problems.append(f"{page.relative_to(folder)}: {link}: there is no such heading or name")
    return problems
