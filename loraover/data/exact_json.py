"""JSON of rows as it was written: no key that occurs twice, and in columns of `datasets` number for number."""

from __future__ import annotations

import json
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text; ValueError: it is none, or an object has a key twice."""
    from loraover.common.strict_json import unique_keys  # with pydantic, which is slow to import

    return json.loads(text, object_pairs_hook=unique_keys)


def keep_numbers() -> None:
    """Let `datasets` write and read the JSON of its columns with Python's json.

    It takes the ujson of pandas, which keeps ten decimals of a number, reads -1.7 as -1.7000000000000002, and knows no
    integer beyond 64 bits, whose message `datasets` 5.2 then returns as text.
    """
    from datasets import arrow_writer
    from datasets.features import features
    from datasets.packaged_modules.json import json as reader
    from datasets.utils import json as fields

    for module in (arrow_writer, features, reader, fields):
        module.ujson_dumps, module.ujson_loads = json.dumps, json.loads
