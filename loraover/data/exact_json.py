"""Columns of `datasets` that hold JSON, number for number."""

from __future__ import annotations

import json


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
