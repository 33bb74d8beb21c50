"""Personal data in texts: e-mail and IP addresses, telephone numbers, IBANs and card numbers, found and replaced.

A pattern finds what may be one, a check tells whether it is: IBAN and card by their check digits (ISO 7064, ISO/IEC
7812), an IP address by its bytes and by being public, a telephone number by the numbering plan of its country. Names
and postal addresses are not looked for: without a model, what is found is mostly wrong.
"""

import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Literal

from pydantic import Field, field_validator

from tasks.common.settings import Settings

Deed = Literal["mark", "refuse", "keep"]
# Lengths are bounded, so that no text makes a search slow (an e-mail's local part has at most 64 signs by RFC 5321).
EMAIL = re.compile(r"\b[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){0,8}\.[A-Za-z]{2,24}\b")
IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,4})?\b")
IP = re.compile(r"(?<![\w.:])(?:\d{1,3}(?:\.\d{1,3}){3}|[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,7})(?![\w:]|\.\d)")
CARD = re.compile(r"(?<![\w.,-])\d(?:[ -]?\d){12,18}(?![\w-]|[.,]\d)")
# What each kind holds, at least; nearly all texts are done with this alone.
HINT = re.compile(r"@|:.*:|\d\.\d+\.\d+\.\d|\d(?:\D?\D?\D?\d){6}")
KINDS = ("email", "iban", "ip", "card", "phone")  # in this order: an IBAN holds what could pass for a card or a number


Spans = Iterator[tuple[int, int]]
Finder = Callable[[str, "Personal"], Spans]


class Personal(Settings):
    """What becomes of personal data, by kind: mark (replace by <EMAIL> and the like), refuse the row, or keep."""

    email: Deed = Field(description="E-mail addresses")
    phone: Deed = Field(description="Telephone numbers, written internationally or as in `region`")
    iban: Deed = Field(description="Bank accounts (IBAN) with right check digits")
    card: Deed = Field(description="Payment card numbers with a right check digit")
    ip: Deed = Field(description="Public IP addresses")
    region: str | None = Field(
        description="Country (ISO 3166) whose way of writing telephone numbers is known; null for +… alone"
    )

    @field_validator("region")
    @classmethod
    def _known(cls, region: str | None) -> str | None:
        import phonenumbers

        known = phonenumbers.SUPPORTED_REGIONS
        if region is not None and region not in known:
            raise ValueError(f"it should be null or one of {', '.join(sorted(known))}")
        return region

    def kinds(self, deed: Deed) -> list[str]:
        """Return the kinds that this is done to, in the order in which they are looked for."""
        return [kind for kind in KINDS if getattr(self, kind) == deed]


def refused_kind(text: str, settings: Personal) -> str | None:
    """Return the first kind in a text for which its row is to be refused, or None."""
    kinds = settings.kinds("refuse")
    found: Counter[str] = Counter()
    if kinds and HINT.search(text):
        _replaced(text, kinds, settings, found)
    return next(iter(found), None)


def marked(text: str, settings: Personal, found: Counter[str]) -> str:
    """Return a text with placeholders for what is to be marked, and count it by kind in `found`."""
    kinds = settings.kinds("mark")
    return _replaced(text, kinds, settings, found) if kinds and HINT.search(text) else text


def _replaced(text: str, kinds: list[str], settings: Personal, found: Counter[str]) -> str:
    for kind in kinds:
        parts, end = [], 0
        for start, stop in FINDERS[kind](text, settings):
            parts += [text[end:start], f"<{kind.upper()}>"]
            end = stop
            found[kind] += 1
        text = "".join([*parts, text[end:]])
    return text


def _matching(pattern: re.Pattern[str], right: Callable[[str], bool]) -> Finder:
    """Return a finder of what matches a pattern and passes its check."""

    def find(text: str, settings: Personal) -> Spans:
        return (match.span() for match in pattern.finditer(text) if right(match[0]))

    return find


def _is_iban(text: str) -> bool:
    from stdnum import iban

    return bool(iban.is_valid(text, check_country=False))


def _is_card(text: str) -> bool:
    from stdnum import luhn

    digits = re.sub(r"\D", "", text)
    return bool(luhn.is_valid(digits)) and digits[0] in "23456"  # the first digits of payment cards


def _is_public_ip(text: str) -> bool:
    try:
        return ipaddress.ip_address(text).is_global
    except ValueError:
        return False


def _phones(text: str, settings: Personal) -> Spans:
    """Find numbers that are grouped as their country groups them; a date or a row of digits alone is none."""
    import phonenumbers

    leniency = phonenumbers.Leniency.STRICT_GROUPING
    for match in phonenumbers.PhoneNumberMatcher(text, settings.region, leniency=leniency):
        if not match.raw_string.isdigit():
            yield match.start, match.end


FINDERS: dict[str, Finder] = {
    "email": _matching(EMAIL, lambda text: True),
    "iban": _matching(IBAN, _is_iban),
    "ip": _matching(IP, _is_public_ip),
    "card": _matching(CARD, _is_card),
    "phone": _phones,
}
