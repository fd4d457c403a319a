"""E-mail addresses, phone numbers and numbers of persons replaced by a word that says what stood there."""

import ipaddress
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from nemo_cpt.cleaning.characters import Kind
from nemo_cpt.cleaning.document import Document
from nemo_cpt.cleaning.rule import Check, Rule
from nemo_cpt.errors import CptError

COUNTRIES = ("jp", "us", "cn", "kr")
_H = r"[-‐‑–−ー－]"  # what people take for a hyphen between digits
_A, _0 = "A-Za-zＡ-Ｚａ-ｚ", "0-9０-９"
_EMAIL = re.compile(
    # From a run's first character alone, of bounded length: linear, whatever the text.
    rf"(?<![{_A}{_0}._%+-])[{_A}{_0}._%+．＿＋-]{{1,64}}[@＠]"
    rf"(?:[{_A}{_0}-]{{1,63}}[.．]){{1,8}}[{_A}]{{2,24}}(?![{_A}{_0}])"
)
_OCTET = r"(?:25[0-5]|2[0-4][0-9]|1?[0-9]?[0-9])"
_IPV4 = re.compile(rf"(?<![A-Za-z0-9_.])(?:{_OCTET}\.){{3}}{_OCTET}(?![A-Za-z0-9_]|\.[0-9])")
_IPV6 = re.compile(r"(?<![0-9A-Za-z:])[23][0-9A-Fa-f]{3}:[0-9A-Fa-f:]{2,34}(?![0-9A-Za-z:])")
_NOT_PUBLIC = re.compile(r"(?:0|10|127|22[4-9]|2[3-5]\d)\.|169\.254\.|192\.168\.|172\.(?:1[6-9]|2\d|3[01])\.")
_LONG_NUMBER = re.compile(r"[0-9０-９](?:[^\w\n]{0,2}\d){6}")  # seven digits: less is neither a phone number nor an id
_BEFORE, _AFTER = rf"(?<![\d.])(?<!\d{_H})", rf"(?!{_H}?\d)"  # no part of a longer number
_PHONES = {
    "": rf"[+＋]\d{{1,3}}(?:[ .]|{_H})?\(?\d{{1,4}}\)?(?:(?:[ .]|{_H})?\d{{2,4}}){{1,4}}",
    "jp": rf"[0０]\d{{1,4}}{_H}\d{{1,4}}{_H}\d{{3,4}}|[(（][0０]\d{{1,4}}[)）] ?\d{{1,4}}{_H}\d{{3,4}}|0[5789]0\d{{8}}"
    r"|[0０]\d{1,4}[(（]\d{1,4}[)）]\d{3,4}|[0０]\d{1,3} \d{2,4} \d{4}|[0０][1-9１-９]\d{8}",
    "us": rf"(?:1(?:[ .]|{_H}))?(?:\([2-9]\d{{2}}\) ?|[2-9]\d{{2}}(?:[ .]|{_H}))[2-9]\d{{2}}(?:[ .]|{_H})\d{{4}}",
    "cn": rf"1[3-9]\d(?:{_H}?\d{{4}}){{2}}|0\d{{2,3}}{_H}\d{{7,8}}|\(0\d{{2,3}}\) ?\d{{7,8}}",
    "kr": rf"0(?:2|[3-6]\d|1[016-9]|[78]0)(?:[ .)]|{_H})\d{{3,4}}(?:[ .]|{_H})\d{{4}}|01[016-9]\d{{7,8}}",
}
# The fewest and the most; E.164 has 15 at most.
_DIGITS_OF_PHONES = {"": (8, 15), "jp": (10, 11), "us": (10, 11), "cn": (10, 12), "kr": (9, 11)}


@dataclass(frozen=True)
class Masking(Rule):
    """Replaces what identifies a person or a machine, and counts it; it drops nothing.

    Numbers that have check digits are masked where these are right: Japan's My Number, China's identity number, cards
    (Luhn). Addresses of private networks stay, they are nobody's, and those of less than seven digits: versions, most.

    Attributes:
        email: What an e-mail address becomes; None leaves them.
        ip: What a public IP address becomes.
        phone: What a phone number becomes.
        identity: What a number of a person or of a payment card becomes.
        countries: Whose phone and identity numbers: `jp`, `us`, `cn`, `kr`; numbers that begin with + always.
    """

    name: ClassVar[str] = "masking"

    email: str | None = "<EMAIL>"
    ip: str | None = "<IP>"
    phone: str | None = "<PHONE>"
    identity: str | None = "<ID>"
    countries: tuple[str, ...] = COUNTRIES

    def __post_init__(self) -> None:
        """Check the countries.

        Raises:
            CptError: The numbers of one are not known.
        """
        super().__post_init__()
        if unknown := set(self.countries).difference(COUNTRIES):
            raise CptError(
                f"{self.name}: no numbers are known of {', '.join(sorted(unknown))}; of {', '.join(COUNTRIES)}."
            )

    def apply(self, document: Document) -> Iterator[Check]:
        """Replace them; nothing is measured."""
        masked = Masked(document.text)
        # Addresses first: what looks like a number within one is not to be masked by itself.
        if self.email is not None and ("@" in document.text or "＠" in document.text):
            masked.replace("email", _EMAIL, self.email)
        # Most texts have no such numbers, and counting is cheaper than looking for them.
        digits = document.counts[Kind.DIGIT]
        if self.ip is not None and digits >= 4 and masked.text.count(".") >= 3:
            masked.replace("ip", _IPV4, self.ip, _is_public)
        if self.ip is not None and masked.text.count(":") >= 2:
            masked.replace("ip", _IPV6, self.ip, _is_ipv6)
        if digits >= 7 and _LONG_NUMBER.search(masked.text):
            self._mask_numbers(masked)
        for what, count in masked.counts.items():
            document.changes[f"masked {what}"] += count
        document.replace(masked.text)
        yield from ()

    def _mask_numbers(self, masked: "Masked") -> None:
        # Identity numbers first: what a phone number's pattern finds in one would leave the rest of it.
        if self.identity is not None:
            for country, pattern, holds in _IDENTITIES:
                if not country or country in self.countries:
                    masked.replace("identity", pattern, self.identity, holds)
        if self.phone is not None:
            for country in ("", *self.countries):
                fewest, most = _DIGITS_OF_PHONES[country]
                pattern = _PATTERNS_OF_PHONES[country]
                masked.replace("phone", pattern, self.phone, lambda found: fewest <= len(_digits(found)) <= most)  # noqa: B023


class Masked:
    """A text in which things are being replaced.

    Attributes:
        text: So far.
        counts: How many were replaced, by what they are.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.counts = dict[str, int]()

    def replace(
        self, what: str, pattern: re.Pattern[str], word: str, holds: Callable[[str], bool] = lambda found: True
    ) -> None:
        """Replace what a pattern finds and `holds` confirms."""

        def mask(match: re.Match[str]) -> str:
            if not holds(match[0]):
                return match[0]
            self.counts[what] = self.counts.get(what, 0) + 1
            return word

        self.text = pattern.sub(mask, self.text)


def _is_public(found: str) -> bool:
    """Tell an address from a version or a list such as 1.3.5.7 by its digits, and from those that are nobody's."""
    return len(_digits(found)) >= 7 and not _NOT_PUBLIC.match(found)


def _is_ipv6(found: str) -> bool:
    """Tell an address, of 2000::/3 by its pattern, which are all that were ever given out, from what only looks so."""
    try:
        ipaddress.IPv6Address(found)
    except ValueError:
        return False
    return True


def _digits(found: str) -> str:
    return "".join(str(unicodedata.digit(character)) for character in found if character.isdigit())


def _is_my_number(found: str) -> bool:
    """Check the last of 12 digits (Ministerial Ordinance 85 of 2014, Ministry of Internal Affairs, article 5)."""
    digits = [int(digit) for digit in _digits(found)]
    rest = sum(digit * weight for digit, weight in zip(digits, (6, 5, 4, 3, 2, 7, 6, 5, 4, 3, 2), strict=False)) % 11
    # Zeros alone have the right last digit, and are nobody's; so `_is_card`.
    return digits[11] == (0 if rest <= 1 else 11 - rest) and len(set(digits)) > 1


def _is_chinese_identity(found: str) -> bool:
    """Check the last of 18 characters (GB 11643-1999)."""
    weights = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
    rest = sum(int(digit) * weight for digit, weight in zip(found, weights, strict=False)) % 11
    return "10X98765432"[rest] == found[17].upper()


def _is_card(found: str) -> bool:
    """Check the last of 16 digits (Luhn, ISO/IEC 7812-1)."""
    digits = [int(digit) for digit in _digits(found)]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[::2]]
    return (sum(doubled) + sum(digits[1::2])) % 10 == 0 and len(set(digits)) > 1


def _number(pattern: str) -> re.Pattern[str]:
    return re.compile(f"{_BEFORE}(?:{pattern}){_AFTER}")


def _grouped(groups: int) -> re.Pattern[str]:
    """Return a pattern of so many groups of four digits that no further group stands beside."""
    return re.compile(rf"(?<!\d )(?<!\d{_H})(?<![\d.])\d{{4}}(?:(?: |{_H})?\d{{4}}){{{groups - 1}}}(?!(?: |{_H})?\d)")


def _always(found: str) -> bool:
    return True


_MONTH_DAY = r"(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])"
_IDENTITIES: tuple[tuple[str, re.Pattern[str], Callable[[str], bool]], ...] = (
    ("", _grouped(4), _is_card),
    ("jp", _grouped(3), _is_my_number),
    ("us", _number(r"(?!000|666|9)[0-9]{3}-(?!00)[0-9]{2}-(?!0000)[0-9]{4}"), _always),
    ("cn", _number(rf"[1-9]\d{{5}}(?:19|20)[0-9]{{2}}{_MONTH_DAY}[0-9]{{3}}[0-9Xx]"), _is_chinese_identity),
    ("kr", _number(rf"[0-9]{{2}}{_MONTH_DAY}-[1-8][0-9]{{6}}"), _always),
)
# Opening brackets and + are no digits: what comes before them does not matter.
_PATTERNS_OF_PHONES = {country: _number(pattern) for country, pattern in _PHONES.items()}
