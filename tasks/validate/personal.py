"""Personal data in texts: finds and replaces e-mail and IP addresses, telephone numbers, IBANs and card numbers.

A pattern finds candidates and a check validates them: IBANs and cards by their check digits (ISO 7064, ISO/IEC 7812),
IP addresses by their bytes and by being public, telephone numbers by the numbering plan of their country. Names and
postal addresses are not searched for: without a model, most matches would be wrong.

Code between backticks, in a line or as a fenced block, is left alone: a command with a placeholder does something else.
"""

import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Literal

from pydantic import Field, field_validator

from tasks.common.settings import Settings

Action = Literal["mark", "reject", "keep"]
# Lengths are bounded so that no text makes the search slow (RFC 5321 allows 64 characters in a local part).
# An address before a colon and a path (git@github.com:team/project) is scp's name of a file.
EMAIL = re.compile(r"\b[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){0,8}\.[A-Za-z]{2,24}\b(?!:[\w~./-])")
CODE = re.compile(r"```.*?```|~~~.*?~~~|`[^`\n]+`", re.DOTALL)
IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,4})?\b")
IP = re.compile(r"(?<![\w.:])(?:\d{1,3}(?:\.\d{1,3}){3}|[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,7})(?![\w:]|\.\d)")
CARD = re.compile(r"(?<![\w.,-])\d(?:[ -]?\d){12,18}(?![\w-]|[.,]\d)")
# Matches any text that may contain one of the kinds; most texts fail it and are skipped.
HINT_PATTERN = re.compile(r"@|:.*:|\d\.\d+\.\d+\.\d|\d(?:\D?\D?\D?\d){6}")
KINDS = ("email", "iban", "ip", "card", "phone")  # in this order: part of an IBAN may look like a card or phone number


Spans = Iterator[tuple[int, int]]
Finder = Callable[[str, "Personal"], Spans]


class Personal(Settings):
    """Action on each kind of personal data: `mark` (replace it with <EMAIL>, ...), `reject` the row, or `keep`."""

    email: Action = Field(default="mark", description="E-mail addresses")
    phone: Action = Field(default="mark", description="Telephone numbers, written internationally or as in `region`")
    iban: Action = Field(default="mark", description="Bank accounts (IBAN) with right check digits")
    card: Action = Field(default="mark", description="Payment card numbers with a right check digit")
    ip: Action = Field(default="mark", description="Public IP addresses")
    region: str | None = Field(
        default=None,
        description="Country (ISO 3166) whose national telephone format is recognized; null for +… alone",
    )

    @field_validator("region")
    @classmethod
    def _validate_region(cls, region: str | None) -> str | None:
        import phonenumbers

        known = phonenumbers.SUPPORTED_REGIONS
        if region is not None and region not in known:
            raise ValueError(f"it should be null or one of {', '.join(sorted(known))}")
        return region

    def kinds(self, action: Action) -> list[str]:
        """Return the kinds with this action, in the order of the search."""
        return [kind for kind in KINDS if getattr(self, kind) == action]


def rejected_kind(text: str, settings: Personal) -> str | None:
    """Return the first kind in a text for which its row is rejected, or None."""
    found: Counter[str] = Counter()
    _replace_outside_code(text, settings.kinds("reject"), settings, found)
    return next(iter(found), None)


def mark_text(text: str, settings: Personal, found: Counter[str]) -> str:
    """Return a text with placeholders for the kinds that are marked, and count them by kind in `found`."""
    return _replace_outside_code(text, settings.kinds("mark"), settings, found)


def _replace_outside_code(text: str, kinds: list[str], settings: Personal, found: Counter[str]) -> str:
    if not kinds or not HINT_PATTERN.search(text):
        return text
    parts, end = [], 0
    for match in CODE.finditer(text) if "`" in text or "~~~" in text else ():
        parts += [_replace_kinds(text[end : match.start()], kinds, settings, found), match[0]]
        end = match.end()
    return "".join([*parts, _replace_kinds(text[end:], kinds, settings, found)])


def _replace_kinds(text: str, kinds: list[str], settings: Personal, found: Counter[str]) -> str:
    for kind in kinds:
        parts, end = [], 0
        for start, stop in FINDERS[kind](text, settings):
            parts += [text[end:start], f"<{kind.upper()}>"]
            end = stop
            found[kind] += 1
        text = "".join([*parts, text[end:]])
    return text


def _pattern_finder(pattern: re.Pattern[str], is_valid: Callable[[str], bool]) -> Finder:
    """Return a finder of the matches of a pattern that pass a check."""

    def find(text: str, settings: Personal) -> Spans:
        return (match.span() for match in pattern.finditer(text) if is_valid(match[0]))

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


def _find_phones(text: str, settings: Personal) -> Spans:
    """Find telephone numbers grouped as usual in their country; dates and plain digits are not matched."""
    import phonenumbers

    leniency = phonenumbers.Leniency.STRICT_GROUPING
    for match in phonenumbers.PhoneNumberMatcher(text, settings.region, leniency=leniency):
        if not match.raw_string.isdigit():
            yield match.start, match.end


FINDERS: dict[str, Finder] = {
    "email": _pattern_finder(EMAIL, lambda text: True),
    "iban": _pattern_finder(IBAN, _is_iban),
    "ip": _pattern_finder(IP, _is_public_ip),
    "card": _pattern_finder(CARD, _is_card),
    "phone": _find_phones,
}
