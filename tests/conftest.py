"""One thread for all tests: their tensors are tiny, and waiting threads slow one another down."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
