"""Characters as they were meant: encodings repaired, Unicode in one form, nothing invisible."""

import re
import sys
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal

import numpy as np

from nemo_cpt.cleaning.characters import Kind
from nemo_cpt.cleaning.document import Document
from nemo_cpt.cleaning.rule import Check, Rule
from nemo_cpt.errors import CptError
from nemo_cpt.installed import extra

# Each text that ftfy would change has one of these, or an entity: letters that bytes become in a wrong encoding (Latin
# with accents, Greek, Cyrillic, the box drawings of code page 437) and control characters. Most East Asian texts have
# none, and are not looked at any further.
_SUSPICIOUS = (
    (0x00, 0x08), (0x0B, 0x1F), (0x7F, 0x24F), (0x2C6, 0x2C6), (0x2DC, 0x2DC), (0x370, 0x4FF), (0x200B, 0x200B),
    (0x2028, 0x2029), (0x2060, 0x2060), (0x206A, 0x206F), (0x221A, 0x221A), (0x2500, 0x257F), (0xD800, 0xDFFF),
    (0xFEFF, 0xFEFF), (0xFFF9, 0xFFFF),
)  # fmt: skip
_ENTITY = re.compile("&(?:#|[A-Za-z]{2})")
_INVISIBLE = re.compile("[\u00ad\u200b\u2060\ufeff]")  # but no joiners, which emoji and Persian are written with
_HALFWIDTH_KATAKANA = re.compile(r"[\uff61-\uff9f]+")
_READ_AS_SHIFT_JIS = "縺繧繝"  # the first bytes of kana in UTF-8, E3 81 to E3 83, as Shift JIS
_BLANK_LINES = re.compile(r"\n(?:[ \t\u3000]*\n){2,}")


@dataclass(frozen=True)
class Repair(Rule):
    """Mends what programs did to the characters, and gives equal characters one form.

    The form is NFC, not NFKC: compatibility characters are what people wrote. NFKC makes ！？（） of East Asian texts
    ASCII, ① a 1, ㎡ m2, … three full stops, x² x2, and users type the full-width forms to the model later. Half-width
    katakana alone are made full-width: nobody writes them but old machines. Duplicates and evaluation sets are compared
    in NFKC, so that no document escapes by its width.

    Attributes:
        mojibake: Mend text that was decoded with a wrong encoding (ftfy), also UTF-8 read as Shift JIS where all of it
            can be told.
        entities: Turn entities such as `&amp;` into characters where the text has no tags (ftfy).
        form: `NFC`, `NFKC` or `none`.
        halfwidth_katakana: Make them full-width.
        max_unreadable_share: Of U+FFFD, unassigned and private characters.
    """

    name: ClassVar[str] = "repair"

    mojibake: bool = True
    entities: bool = True
    form: Literal["NFC", "NFKC", "none"] = "NFC"
    halfwidth_katakana: bool = True
    max_unreadable_share: float | None = 0.001

    def load(self) -> None:
        """Import ftfy.

        Raises:
            CptError: It is not installed.
        """
        if self.mojibake or self.entities:
            _ftfy(self.mojibake, self.entities)

    def apply(self, document: Document) -> Iterator[Check]:
        """Mend the text, then see how much of it nobody can read."""
        self._mend(document, bool(_suspicious()[document.codes].any()))
        document.replace(self._in_form(document))
        unreadable = document.counts[Kind.UNREADABLE] / max(len(document.text), 1)
        yield Check("unreadable_share", unreadable, at_most=self.max_unreadable_share)

    def _mend(self, document: Document, suspicious: bool) -> None:
        text = document.text
        if (self.mojibake and suspicious) or (self.entities and "&" in text and _ENTITY.search(text)):
            import ftfy

            text = ftfy.fix_text(text, _ftfy(self.mojibake, self.entities))
        if self.mojibake:
            text = _from_shift_jis(text)
        if text != document.text:
            document.changes["repaired encoding"] += 1
        document.replace(_INVISIBLE.sub("", text) if suspicious else text)

    def _in_form(self, document: Document) -> str:
        text = before = document.text
        if self.halfwidth_katakana and ((document.codes >= 0xFF61) & (document.codes <= 0xFF9F)).any():
            # Runs, not characters: a voiced one is written as two, and becomes one.
            text = _HALFWIDTH_KATAKANA.sub(lambda run: unicodedata.normalize("NFKC", run[0]), text)
        if self.form != "none" and not unicodedata.is_normalized(self.form, text):
            text = unicodedata.normalize(self.form, text)
        if text != before:
            document.changes["normalized Unicode"] += 1
        return _BLANK_LINES.sub("\n\n", text.replace("\r\n", "\n").replace("\r", "\n")).strip()


def _from_shift_jis(text: str) -> str:
    if sum(map(text.count, _READ_AS_SHIFT_JIS)) * 10 < len(text):
        return text
    try:
        return text.encode("cp932").decode("utf-8")
    except UnicodeError:  # bytes are lost: the text stays, and is no Japanese to the rules that follow
        return text


@cache
def _suspicious() -> Any:
    table = np.zeros(sys.maxunicode + 1, bool)
    for first, last in _SUSPICIOUS:
        table[first : last + 1] = True
    return table


@cache
def _ftfy(mojibake: bool, entities: bool) -> Any:
    try:
        from ftfy import TextFixerConfig
    except ImportError as error:
        raise CptError(
            f"encodings are repaired by ftfy, which is not installed: {extra('clean')}, or do without "
            "(repair: mojibake: false, entities: false)"
        ) from error
    return TextFixerConfig(
        unescape_html="auto" if entities else False,
        fix_encoding=mojibake,
        restore_byte_a0=mojibake,
        replace_lossy_sequences=mojibake,
        decode_inconsistent_utf8=mojibake,
        fix_c1_controls=mojibake,
        # What people wrote stays: quotes, ligatures and widths are no faults.
        uncurl_quotes=False,
        fix_latin_ligatures=False,
        fix_character_width=False,
        normalization=None,
    )
