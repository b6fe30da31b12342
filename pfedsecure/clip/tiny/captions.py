"""Captions: what a glyph is called and how it is written, in sentences of many lengths.

A learned prompt puts up to sixteen vectors before the class name, so a name must be understood wherever it stands:
captions are 4 to about 25 tokens long. Articles are not inflected; nor are those of a zero-shot template.
"""

from __future__ import annotations

import random
from collections.abc import Collection

from pfedsecure.clip.tiny.glyphs import Glyph

CONDITION_WORDS: dict[str, tuple[str, ...]] = {
    "inverted": ("inverted", "black on white", "negative", "dark on light"),
    "rotated": ("rotated", "tilted", "turned"),
    "thick": ("thick", "bold", "heavy"),
    "thin": ("thin", "fine", "slim"),
    "blurred": ("blurred", "blurry", "unsharp"),
    "noisy": ("noisy", "grainy", "speckled"),
    "small": ("small", "tiny", "little"),
}
_UNTOLD = 0.25  # share of the conditions that a caption passes over
_LEADS = (
    "",
    "this is",
    "here is",
    "we see",
    "here you can see",
    "what you see here is",
    "from the archive of the post office :",
    "taken from page two of an old book ,",
    "after a long search somebody found",
    "the file on the desk shows",
    "in the upper left corner there is",
)
_MEDIA = ("photo", "picture", "image", "scan", "print", "drawing", "close up", "sketch", "copy")
_NOUNS: dict[str, tuple[str, ...]] = {
    "digit": ("digit", "number", "numeral", "figure"),
    "capital": ("letter", "capital letter", "upper case letter"),
    "small": ("letter", "lower case letter"),
    "sign": ("sign", "symbol"),
}
_HANDS = ("written", "handwritten", "printed", "typed")
_JOINTS = (" ", " and ", " , ")


def caption(glyph: Glyph, conditions: Collection[str], rng: random.Random) -> str:
    """One sentence that names `glyph` and most of the `conditions` (keys of CONDITION_WORDS) it is written in."""
    present = [words for name, words in CONDITION_WORDS.items() if name in conditions]
    told = [rng.choice(words) for words in present if rng.random() > _UNTOLD]
    if "inverted" not in conditions and rng.random() < 0.1:
        told.append("white on black")
    if not conditions and rng.random() < 0.2:
        told.append(rng.choice(("clean", "clear", "plain")))
    rng.shuffle(told)
    described = rng.choice(_JOINTS).join(told)
    noun = rng.choice(_NOUNS[glyph.kind]) if rng.random() < 0.7 else ""
    hand = rng.choice(_HANDS) if rng.random() < 0.2 else ""
    named = _sentence(hand, noun, glyph.name)
    form = rng.random()
    if form < 0.25:
        return _sentence(described, named) + "."
    lead = rng.choice(_LEADS) if rng.random() < 0.75 else ""
    medium = rng.choice(_MEDIA) if rng.random() < 0.6 else "photo"
    article = rng.choice(("a", "the"))
    if form < 0.6:
        return _sentence(lead, "a", described, medium, "of", article, named) + "."
    return _sentence(lead, "a", medium, "of", article, described, named) + "."


def _sentence(*parts: str) -> str:
    return " ".join(part for part in parts if part)
