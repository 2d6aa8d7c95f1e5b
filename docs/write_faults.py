"""Write docs/faults.md from the table of known faults.

    python docs/write_faults.py

The table is `export/loraover_export/known_faults.json`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from loraover_export.known_faults import KnownFault, KnownFaults, Versions, known_faults

PAGE = Path(__file__).with_name("faults.md")
SOURCE = "https://github.com/{}/issues/{}"

INTRODUCTION = """# Known faults

This page lists faults with which engines, and the programs around them, serve adapters wrongly. Each entry names the
affected releases, the public threads, a remedy, and the command that finds the fault, with its output. *Shown by* names
the test of this repository that reproduces the fault. *Read, not run* means that we only read the threads, and did not
see the command's output. If an entry names no command, no command of LoRA-Over finds the fault.

`loraover check` lists the known faults of the engines that it judges, `loraover doctor` those of the installed engines,
and `loraover verify` those of the engine that answered. A known fault does not change a verdict. Is your fault not
here? [Find a command](what-now.md).

`python docs/write_faults.py` writes this page from `export/loraover_export/known_faults.json`.
"""


def capitalised(text: str) -> str:
    """Return a text whose first letter is a capital, unless it begins with a name such as rsLoRA."""
    return text if re.search(r"[A-Z_]", text.partition(" ")[0]) else text[:1].upper() + text[1:]


def releases(fault: KnownFault) -> str:
    """Return the releases that have a fault, in words."""
    versions = fault.versions
    if versions == Versions():
        found = "no fixed release is known"
    else:
        parts = [
            f"from {versions.since}" if versions.since else "",
            f"before {versions.before}" if versions.before else "",
        ]
        found = "releases " + " and ".join(filter(None, parts))
    return found if fault.seen is None else f"{found}; seen in {fault.seen}"


def thread(name: str) -> str:
    """Return a link to an issue or a pull request; the code host forwards from one to the other."""
    repository, _, number = name.partition("#")
    return f"[{name}]({SOURCE.format(repository, number)})"


def anchor(fault: KnownFault) -> str:
    """Return the place of a fault's section, which the code host and the site make of its title in the same way."""
    return re.sub(r"[^\w -]", "", fault.name).lower().replace(" ", "-")


def by_words(table: KnownFaults) -> Iterator[str]:
    """Yield a list of the words that users search for, with links to the faults that look like that."""
    yield from ("## What do you see?", "")
    for words in dict.fromkeys(word for fault in table.faults for word in fault.words):
        alike = [fault for fault in table.faults if words in fault.words]
        links = (f"[{table.names[fault.engine]}: {fault.name}](#{anchor(fault)})" for fault in alike)
        yield f"- **{capitalised(words)}**: {'; '.join(links)}"
    yield ""


def described(fault: KnownFault) -> Iterator[str]:
    """Yield the lines of a fault's section."""
    device = {None: "", "cpu": ", on a CPU", "cuda": ", on a GPU"}[fault.platform]
    yield f"### {capitalised(fault.name)}"
    yield ""
    yield f"{capitalised(fault.symptom)}."
    yield ""
    yield f"- Releases: {releases(fault)}{device}."
    yield f"- Threads: {', '.join(map(thread, fault.threads)) or 'none was found'}."
    yield f"- What to do: {fault.cure}."
    yield f"- Here: {'read, not run' if fault.shown_by is None else f'shown by `{fault.shown_by}`'}."
    if fault.command is not None:
        shows = "shows" if fault.shown_by else "would show"
        yield f"- Command: `{fault.command}`" + (f" {shows} *{fault.shown_as}*." if fault.shown_as else "")
    yield ""
    if fault.picture is not None:
        yield from (f"![{capitalised(fault.name)}: what the check shows.](figures/{fault.picture})", "")


def page() -> str:
    """Return the text of the page."""
    table = known_faults()
    lines = [INTRODUCTION, *by_words(table)]
    for engine, name in table.names.items():
        lines += [f"## {name}", ""]
        for fault in table.faults:
            if fault.engine == engine:
                lines += described(fault)
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
