"""Process of onnxruntime-genai's model builder: import it, then run it with the arguments that come on standard input."""

from __future__ import annotations

import json
import runpy
import sys
import warnings
from importlib import import_module

BUILDER = "onnxruntime_genai.models.builder"


def main() -> None:
    """Run the builder as its documented command, unless the input ends before there are arguments."""
    # PEFT would import it for models in 8 or 4 bits, which takes longer than many a build; the builder's model has none.
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]
    import_module(BUILDER)
    line = sys.stdin.readline()
    if line:
        sys.argv = [BUILDER, *json.loads(line)]
        warnings.filterwarnings("ignore", "'onnxruntime_genai", RuntimeWarning, "runpy")  # it is imported already
        runpy.run_module(BUILDER, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
