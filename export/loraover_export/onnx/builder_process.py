"""Process of onnxruntime-genai's model builder, which reads the builder's arguments from standard input."""

from __future__ import annotations

import json
import runpy
import sys
import warnings
from importlib import import_module

BUILDER = "onnxruntime_genai.models.builder"


def main() -> None:
    """Run the builder as its documented command, unless the input ends before there are arguments."""
    # PEFT would import it for layers in 8 or 4 bits, which no model here has; that takes longer than many a build.
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]
    import_module(BUILDER)
    line = sys.stdin.readline()
    if line:
        sys.argv = [BUILDER, *json.loads(line)]
        warnings.filterwarnings("ignore", "'onnxruntime_genai", RuntimeWarning, "runpy")  # it is imported already
        runpy.run_module(BUILDER, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
