"""Prepare a fleet of adapters on Ray Data: python prepare_on_ray.py CACHE ADAPTER...

`prepare_adapter` can be sent to other processes, so the cluster that a company has anyway does the work. The cache is a
folder that all workers reach, and every adapter's base model is the one that it names.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import ray

from loraover_export import prepare_adapter

WORKERS = 2


def prepare(row: dict[str, Any]) -> dict[str, Any]:
    """Prepare one adapter, and say what became of it."""
    adapter = Path(row["item"])
    model = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    try:
        prepared = prepare_adapter(adapter, row["cache"], model=model)
    except ValueError as error:  # what is wrong with this adapter, which must not end the others
        return {"adapter": str(adapter), "done": "refused", "path": "", "reason": str(error)}
    return {"adapter": str(adapter), "done": prepared.done, "path": str(prepared.path), "reason": ""}


def main(cache: str, *adapters: str) -> None:
    ray.init(num_cpus=WORKERS, include_dashboard=False, logging_level="error")
    ray.data.DataContext.get_current().enable_progress_bars = False
    fleet = ray.data.from_items([{"item": adapter, "cache": str(Path(cache).absolute())} for adapter in adapters])
    for row in fleet.repartition(len(adapters)).map(prepare, num_cpus=1).take_all():
        print(json.dumps(row))


if __name__ == "__main__":
    main(*sys.argv[1:])
