"""Final answers in generated text."""

from __future__ import annotations

import re
from decimal import Decimal

_NUMBER = re.compile(r"[-+−]?\s?[$€£]?\s?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[-+−]?\.\d+")


def final_number(text: str) -> Decimal | None:
    """The number after the last `####`, or else the last number; None without one.

    Thousands separators, currency signs and units around the number are ignored: "#### $1,234.50 each" is 1234.50.
    A sign counts where no digit or letter stands before it, so "9-5" ends in 5.
    """
    marked = text.rpartition("####")[2] if "####" in text else text
    matches = list(_NUMBER.finditer(marked))
    if not matches:
        return None
    match = matches[0] if "####" in text else matches[-1]
    digits = re.sub(r"[^\d.]", "", match.group())
    before = marked[: match.start()].rstrip()
    negative = match.group()[0] in "-−" and not (before and before[-1].isalnum())
    return Decimal(digits).copy_negate() if negative else Decimal(digits)
