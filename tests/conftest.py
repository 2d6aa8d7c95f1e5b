"""What every test stands on: one thread, since tensors are tiny and waiting threads slow one another down, and Ctrl-C,
which a script that runs the suite in its background would have it ignore, with every process that it starts."""

from __future__ import annotations

import signal

import torch

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)
