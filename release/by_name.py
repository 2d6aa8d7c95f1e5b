"""Let messages and pages install LoRA-Over by its name, once a package index has a release.

    python release/by_name.py [FOLDER]

FOLDER is the repository, by default this one. `SOURCE` in loraover/common/extras.py, which messages and the tests of
pages follow, becomes the name, and so does the clone in the commands of pages and help texts.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAME = "loraover"
EXTRAS = Path("loraover", "common", "extras.py")
WRITTEN = ("README.md", "docs/**/*.md", "serve/**/*.py", "integrations/**/*.md", "tests/support/*.md")
"""Files that name the command in words of their own."""
COMMAND = r"(pip install (?:[^\n`#]* )?)"
PATTERNS = {
    r" +# in a clone of LoRA-Over$": "",
    r"# (?:in|from) a clone(?: of LoRA-Over)?, ": "# ",
    r"(\]\"|install \.`) in a clone(?: of\s+LoRA-Over)?": r"\1",
    COMMAND + r"\"\.\[": rf'\1"{NAME}[',
    COMMAND + r"\.(?=[ `\n])": rf"\1{NAME}",
}
"""Words of a clone, and those that take their place, in this order."""


def by_name(text: str) -> str:
    """Return a text whose commands of pip install the name in place of a clone."""
    for pattern, words in PATTERNS.items():
        text = re.sub(pattern, words, text, flags=re.MULTILINE)
    return text


def main(root: Path) -> None:
    """Change the constant and the pages of a repository."""
    extras = root / EXTRAS
    extras.write_text(extras.read_text().replace('SOURCE = "."', f'SOURCE = "{NAME}"'))
    for path in (path for pattern in WRITTEN for path in root.glob(pattern)):
        text = path.read_text()
        if (changed := by_name(text)) != text:
            path.write_text(changed)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
