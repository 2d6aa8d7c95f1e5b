"""Model cards: the README.md of an adapter's folder."""

from __future__ import annotations

import json
from collections.abc import Mapping

from loraover.reporting.table import facts_table, plain


def _yaml_string(text: str) -> str:
    """Quote a text for YAML, which allows fewer unescaped characters than JSON does."""
    quoted = json.dumps(text, ensure_ascii=False)
    return "".join(c if c.isprintable() else f"\\U{ord(c):08X}" for c in quoted)


def model_card(
    title: str,
    base_model: str | None,
    facts: Mapping[str, str],
    command: str,
    *,
    licence: str | None = None,
    kind: str = "A plain LoRA adapter",
    library: str = "peft",
) -> str:
    """Return a model card: front matter for the hub, a table of facts, and the command that made the folder.

    Args:
        title: Heading.
        base_model: Hub name or folder of the base model.
        facts: Rows of the table. The texts may come from outside; they are escaped.
        command: Command line that made the folder.
        licence: Licence of the base model, as its model card states it; it applies to the adapter too.
        kind: Kind of thing in the folder; "of <base model>" follows it.
        library: Library that reads the folder.
    """
    front = [f"library_name: {library}", "tags: [lora, loraover]" if library == "peft" else "tags: [loraover]"]
    if licence is not None:
        front.append(f"license: {_yaml_string(licence)}")
    if base_model is not None:
        front.insert(0, f"base_model: {_yaml_string(base_model)}")
    base = plain(base_model or "an unnamed base model")
    stated = "" if licence is None else f" ({plain(licence)})"
    fence = "```"
    code = " ".join(command.split()).replace("`", "'")
    return (
        "---\n" + "\n".join(front) + f"\n---\n# {plain(title)}\n\n"
        f"{kind} of {base}; the base model's licence{stated} applies to its use.\n\n"
        f"{facts_table(list(facts.items()), ('', '')).markdown()}\n\nMade by\n\n{fence}\n{code}\n{fence}\n"
    )
