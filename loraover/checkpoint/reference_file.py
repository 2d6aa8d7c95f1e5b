"""The name of the file with what PyTorch answered, which commands name before they read one."""

from __future__ import annotations

REFERENCE_FILE = "adapter_reference.json.gz"
