"""The page docs/results-gpu.md and its JSON, from the records of the measurements."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from loraover.common.atomic_output import publish_text

from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.run import Outcome

HEAD = """# Results on a GPU

`make gpu` has measured what stands here, and has written this page and [its numbers](results-gpu.json). The models
have random weights. Square brackets are the 95 % interval of the median, round brackets the range of fewer than six
rounds.

{origin}
"""


def write_page(page: Path, origin: str, outcomes: Mapping[str, Outcome]) -> None:
    """Write the page, and a JSON file of the same name."""
    texts = [HEAD.format(origin=origin)]
    for name, (seconds, found, reason) in outcomes.items():
        contents = [part for part in found.get("parts", []) if isinstance(part, str)]
        if reason:
            indented = "\n".join(f"    {line}".rstrip() for line in reason.splitlines())
            contents += [f"**Failed** after {seconds:.0f} s.", indented]
        else:
            contents.append(f"Measured in {seconds:.0f} s.")
        texts.append("\n\n".join([f"## {PARTS[name].title}", *contents]) + "\n")
    publish_text(page, "\n".join(texts))
    records = {name: outcome._asdict() for name, outcome in outcomes.items()}
    publish_text(page.with_suffix(".json"), json.dumps({"origin": origin, "measurements": records}, indent=1) + "\n")
