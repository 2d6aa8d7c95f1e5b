"""Faults of the product, planted one at a time, and whether the tests that should notice each of them do.

    cd tests
    python -m mutants --baseline                       # all of them
    python -m mutants mpo-rows-before-columns --jobs 2

A mutant is *killed* where its tests fail, and *survives* where they pass. It is *broken*, and shows nothing, where its
source does not occur exactly once, no test ran, or a module does not load. A survivor asks for a better test, not for
another mutant. Nothing is written into this checkout, which may change meanwhile: each mutant has a copy of it as it
was at the beginning.
"""

from __future__ import annotations

from mutants.export import EXPORT
from mutants.methods import METHODS
from mutants.mutant import ROOT, Mutant
from mutants.preparing import PREPARING
from mutants.requests import REQUESTS
from mutants.run import file_of, judge, place_of, product_files
from mutants.serving import SERVING
from mutants.training import TRAINING
from mutants.watching import WATCHING

__all__ = ["MUTANTS", "ROOT", "Mutant", "file_of", "judge", "place_of", "product_files"]

MUTANTS = (*TRAINING, *REQUESTS, *METHODS, *EXPORT, *PREPARING, *SERVING, *WATCHING)
