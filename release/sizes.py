"""Print the sizes of installations, as docs/how-to/install.md has them; `make release` comes first.

.venv-release/bin/python release/sizes.py torch serve export train
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from make import DIST, find_python, install

PYTHON = "3.11"


def main() -> None:
    """Install the wheel alone, and with each extra, into new environments."""
    wheel, interpreter = next((DIST / "packages").glob("*.whl")), find_python(PYTHON)
    if interpreter is None:
        sys.exit(f"Python {PYTHON} is not installed here.")
    for extra in ("", *sys.argv[1:]):
        print(f"{extra or 'base'}: ", end="", flush=True)
        with tempfile.TemporaryDirectory(prefix="loraover-sizes-") as folder:
            install(interpreter, f"{wheel}[{extra}]" if extra else wheel, Path(folder))


if __name__ == "__main__":
    main()
