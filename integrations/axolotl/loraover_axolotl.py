"""Plug-in for axolotl.

Copy this file beside your YAML file, and write there `plugins: [loraover_axolotl.LoraOverPlugin]`.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin

from loraover import LoraOverCallback, LoraOverConfig


class LoraOverPlugin(BasePlugin):
    """Add LoRA-Over's callback to the trainer, after axolotl's own."""

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        """Return the callback."""
        return [LoraOverCallback(LoraOverConfig())]
