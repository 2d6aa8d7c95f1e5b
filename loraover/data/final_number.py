"""Final numbers in texts, which references and answers are compared by; read without PyTorch."""

from __future__ import annotations

import re
from decimal import Decimal

_NUMBER = re.compile(r"(?P<number>[-+−]?\s?[$€£]?\s?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[-+−]?\.\d+)")
_MARKED = re.compile(
    rf"(?<!#)####[^\S\n]*(?:[$€£][^\S\n]*)?{_NUMBER.pattern}(?:[^\S\n]*(?:[^\s\d.#][^\s#]*|\.))?[^\S\n]*$",
    re.MULTILINE,
)


def final_number(text: str) -> Decimal | None:
    """Read the number of the last line that ends in `####` and a number, or else the last number; None without any.

    Thousands separators, currency signs and one word after the number are ignored: "#### $1,234.50 each" is 1234.50.
    `####` also begins headings of Markdown; "#### Step 1: add" and "#### 3. Add up" give no number.
    A sign counts where it stands before a number as in "is -3"; "9-5", "9 - 5", "(9)-5" and "9%-5%" end in 5, and so
    does a list's item "- 5".
    """
    found = list(_MARKED.finditer(text)) or list(_NUMBER.finditer(text))
    if not found:
        return None
    written = found[-1]["number"]
    digits = re.sub(r"[^\d.]", "", written)
    before, sign = text[: found[-1].start("number")], written[:2]
    is_item = False
    if sign[1:].isspace():
        before = before.rstrip(" \t")
        is_item = before.endswith("\n")
        before = before.rstrip()
    negative = sign[0] in "-−" and not (is_item or before[-1:].isalnum() or before.endswith((")", "%")))
    return Decimal(digits).copy_negate() if negative else Decimal(digits)
