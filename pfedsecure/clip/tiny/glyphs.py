"""Glyphs to pre-train on: digits, letters and signs, drawn in the text fonts that matplotlib bundles.

No scan of a handwritten digit is used here or in any other part of the pre-training.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

# Only fonts of ordinary text: the symbol, display and last-resort fonts draw other shapes under these characters.
FONTS: tuple[str, ...] = (
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSans-BoldOblique.ttf",
    "DejaVuSans-Oblique.ttf",
    "DejaVuSansMono.ttf",
    "DejaVuSansMono-Bold.ttf",
    "DejaVuSansMono-BoldOblique.ttf",
    "DejaVuSansMono-Oblique.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSerif-Bold.ttf",
    "DejaVuSerif-BoldItalic.ttf",
    "DejaVuSerif-Italic.ttf",
    "STIXGeneral.ttf",
    "STIXGeneralBol.ttf",
    "STIXGeneralBolIta.ttf",
    "STIXGeneralItalic.ttf",
    "cmb10.ttf",
    "cmr10.ttf",
    "cmss10.ttf",
    "cmti10.ttf",
    "cmtt10.ttf",
)
CANVAS = 64  # pixels of a drawing's side
INK = 40  # pixels of the longer side of the glyph in it; the rest is room for turning and thickening

_FONT_SIZE = 160
_SHEET = (400, 400)
_ORIGIN = (100, 80)  # far enough from the sheet's edge for every glyph of every font


@dataclass(frozen=True)
class Glyph:
    """A character and its name. `kind` is "digit", "capital", "small" or "sign"."""

    kind: str
    name: str
    char: str


_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# Squeezed to 8 x 8 pixels O and I are zero and one, and the small letters left out look like their capital or like one.
_CAPITALS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
_SMALL = "abdefghmnqrty"
_SIGNS = {
    "!": "exclamation mark",
    "?": "question mark",
    "+": "plus",
    "=": "equals",
    "*": "asterisk",
    "&": "ampersand",
    "#": "hash",
    "%": "percent",
    "/": "slash",
}

GLYPHS: tuple[Glyph, ...] = (
    *(Glyph("digit", name, str(value)) for value, name in enumerate(_DIGITS)),
    *(Glyph("capital", char.lower(), char) for char in _CAPITALS),
    *(Glyph("small", char, char) for char in _SMALL),
    *(Glyph("sign", name, char) for char, name in _SIGNS.items()),
)
N_DIGITS = len(_DIGITS)
"""The first so many of `GLYPHS` are the digits, in order of value."""


def draw(char: str, font: str) -> Image.Image:
    """`char` in white on black, in the middle of a CANVAS x CANVAS grey image; its longer side is INK pixels."""
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / font
    # The basic layout engine is part of every Pillow; Raqm, where there is one, may place ink differently.
    face = ImageFont.truetype(path, size=_FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)
    sheet = Image.new("L", _SHEET)
    ImageDraw.Draw(sheet).text(_ORIGIN, char, fill=255, font=face)
    ink = sheet.crop(sheet.getbbox())
    scale = INK / max(ink.size)
    ink = ink.resize((max(1, round(ink.width * scale)), max(1, round(ink.height * scale))), Image.Resampling.BOX)
    canvas = Image.new("L", (CANVAS, CANVAS))
    canvas.paste(ink, ((CANVAS - ink.width) // 2, (CANVAS - ink.height) // 2))
    return canvas


@cache
def drawings() -> Tensor:
    """Every glyph in every font: `(len(GLYPHS), len(FONTS), CANVAS, CANVAS)` float32 in [0, 1]."""
    pages = [[np.asarray(draw(glyph.char, font)) for font in FONTS] for glyph in GLYPHS]
    return torch.from_numpy(np.asarray(pages)).float() / 255
