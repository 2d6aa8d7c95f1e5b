"""LLaMA-Factory with LoRA-Over: python train.py SETTINGS.yaml, with the file of `llamafactory-cli train`.

Its YAML file cannot name callbacks, so its function is called with one.
"""

from __future__ import annotations

import sys
from pathlib import Path

import yaml
from llamafactory.train.tuner import run_exp

from loraover import LoraOverCallback, LoraOverConfig

if __name__ == "__main__":
    run_exp(yaml.safe_load(Path(sys.argv[1]).read_text()), callbacks=[LoraOverCallback(LoraOverConfig())])
