"""Builds build/docs: the pages, and the API reference from docstrings. Offline; `make docs` runs it.

Ends with 1 and says why when a link leads nowhere; a warning, of pdoc or of any import, is an error.
"""

from __future__ import annotations

import shutil
import sys
import warnings
from pathlib import Path

import links
import pages
import reference

ROOT = Path(__file__).resolve().parents[2]


def build(out: Path) -> list[str]:
    """Write everything to the folder `out`, in place of what it had; links that do not hold and warnings, in words."""
    shutil.rmtree(out, ignore_errors=True)
    problems = pages.write(ROOT, out)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reference.write(ROOT, out / reference.FOLDER)
    problems += [f"{warning.category.__name__}: {warning.message}" for warning in caught]
    return problems + links.broken(out)


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "docs"
    wrong = build(target)
    print("\n".join(wrong), file=sys.stderr, end="\n" if wrong else "")
    if not wrong:
        print(f"{target / 'index.html'}: {sum(1 for _ in target.rglob('*.html'))} pages, all links hold")
    sys.exit(bool(wrong))
