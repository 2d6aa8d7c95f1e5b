"""The command `trl sft` with LoRA-Over: python integrations/trl/sft.py --use_peft ..., with all options of `trl sft`.

`trl sft` itself takes no callbacks. TRL's script is called with a trainer that has one more.
"""

from __future__ import annotations

from typing import Any

import trl
from trl.scripts import sft

from loraover import LoraOverCallback, LoraOverConfig


class OverSFTTrainer(trl.SFTTrainer):
    """TRL's trainer, with the cores of LoRA-Over."""

    def __init__(self, *args: Any, callbacks: Any = None, **options: Any) -> None:
        super().__init__(*args, callbacks=[*(callbacks or []), LoraOverCallback(LoraOverConfig())], **options)


if __name__ == "__main__":
    trl.SFTTrainer = OverSFTTrainer  # which the script imports when it is called
    sft.main(*sft.make_parser(prog="sft.py").parse_args_and_config(fail_with_unknown_args=False))
