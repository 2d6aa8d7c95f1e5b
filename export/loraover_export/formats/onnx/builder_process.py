"""Process of onnxruntime-genai's model builder, which reads the builder's arguments from standard input."""

from __future__ import annotations

import json
import os
import runpy
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module

BUILDER = "onnxruntime_genai.models.builder"


def main() -> None:
    """Run the builder as its documented command, unless the input ends before there are arguments.

    The input ends with the process that would have given them, which may be killed while the builder is imported.
    """
    arguments = ThreadPoolExecutor().submit(_read_or_end)
    # PEFT would import it for layers in 8 or 4 bits, which no model here has; that takes longer than many a build.
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]
    import_module(BUILDER)
    sys.argv = [BUILDER, *json.loads(arguments.result())]
    warnings.filterwarnings("ignore", "'onnxruntime_genai", RuntimeWarning, "runpy")  # it is imported already
    runpy.run_module(BUILDER, run_name="__main__", alter_sys=True)


def _read_or_end() -> str:
    line = sys.stdin.readline()
    if not line:
        os._exit(0)
    return line


if __name__ == "__main__":
    main()
