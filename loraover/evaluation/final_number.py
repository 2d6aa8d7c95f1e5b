"""Final numbers in generated text."""

from __future__ import annotations

import re
from decimal import Decimal

_NUMBER = re.compile(r"[-+−]?\s?[$€£]?\s?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[-+−]?\.\d+")


def final_number(text: str) -> Decimal | None:
    """Read the number after the last `####`, or else the last number; None if there is none.

    Thousands separators, currency signs and units around the number are ignored: "#### $1,234.50 each" is 1234.50.
    A sign counts where it stands before a number as in "is -3"; "9-5", "9 - 5", "(9)-5" and "9%-5%" end in 5, and so
    does a list's item "- 5".
    """
    marked = text.rpartition("####")[2] if "####" in text else text
    matches = list(_NUMBER.finditer(marked))
    if not matches:
        return None
    match = matches[0] if "####" in text else matches[-1]
    digits = re.sub(r"[^\d.]", "", match.group())
    before, sign = marked[: match.start()], match.group()[:2]
    is_item = False
    if sign[1:].isspace():
        before = before.rstrip(" \t")
        is_item = before.endswith("\n")
        before = before.rstrip()
    negative = sign[0] in "-−" and not (is_item or before[-1:].isalnum() or before.endswith((")", "%")))
    return Decimal(digits).copy_negate() if negative else Decimal(digits)
