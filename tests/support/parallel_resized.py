"""A script for torchrun: runs of `loraover train` that are begun, or continued, by as many processes as it is given.

    torchrun --standalone --nproc-per-node N support/parallel_resized.py RECIPE NAME...

The runs lie beside RECIPE, and those that are there are continued. A name is that of an engine, or "<engine>-<method>"
for a run of that method, whose step the recipe alone gives.
"""

from __future__ import annotations

import sys
from pathlib import Path

from accelerate import PartialState

from support.parallel_command import RUNS, called, engine
from support.parallel_fsdp_trainer import allow_fsdp_on_cpus


def main(recipe: Path, *names: str) -> None:
    plain = PartialState.__init__
    for name in names:
        kind, _, method = name.partition("-")
        PartialState.__init__ = plain
        if kind == "fsdp2":
            allow_fsdp_on_cpus()
        words = [*engine(kind), "--method", method] if method else RUNS[kind]
        found = called(recipe, "-o", recipe.parent / name, *words, "--resume", "auto")
        print(found["out"], found["error"], file=sys.stderr)
        if found["code"]:
            sys.exit(found["code"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
