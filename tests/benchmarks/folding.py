"""Fold of a synthetic checkpoint with Llama-3.1-8B's shapes, compared with PEFT's conversion.

The fold runs in a separate process, which reports its seconds after imports and the peak memory that the fold adds.
PEFT's `convert_to_lora` is measured on one of the model's smallest linear layers, k_proj of
4096 x 1024; the figure for the model is that time multiplied by the number of its layers, which is an underestimate.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from loraover import LoraOverConfig
from loraover.checkpoint.checkpoint import CORES_FILE, META_FILE, Meta, SiteRecord
from loraover.checkpoint.peft_adapter import CONFIG_FILE, TENSORS_FILE, site_key
from loraover.checkpoint.tensor_file import save_tensors, sha256_of

RANK, LAYERS = 16, 32
LINEARS = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}


def write_synthetic_checkpoint(folder: Path) -> None:
    """A checkpoint of 448 random matrices in the shapes of Llama-3.1-8B, r = 16."""
    config = LoraOverConfig(seed=0)
    decomposition = config.make_decomposition()
    draw = torch.Generator().manual_seed(0)
    matrices: dict[str, Tensor] = {}
    cores: dict[str, Tensor] = {}
    sites = []
    for layer in range(LAYERS):
        for linear, (out_features, in_features) in LINEARS.items():
            for kind, (m, n) in (("lora_A", (RANK, in_features)), ("lora_B", (out_features, RANK))):
                site = SiteRecord(
                    name=f"model.layers.{layer}.{linear}.{kind}", m=m, n=n, step=0, joined=True, shares={}
                )
                start = torch.randn(1, m, n, generator=draw, dtype=torch.float64) * 0.02
                made = [core.float() for core in decomposition.init(start, [draw])]
                cores |= {site.core_key(k): core[0] for k, core in enumerate(made)}
                matrices[site_key(site.name)] = decomposition.contract(made, m, n)[0].contiguous()
                sites.append(site)
    folder.mkdir()
    adapter_config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 16, "base_model_name_or_path": None}
    (folder / CONFIG_FILE).write_text(json.dumps(adapter_config))
    save_tensors(matrices, folder / TENSORS_FILE)
    save_tensors(cores, folder / CORES_FILE)
    meta = Meta(
        base_model=None,
        step=0,
        config=config,
        core_dtype="float32",
        sites=sites,
        rounds=[],
        optimizer_steps=0,
        optimizer=None,
        world_size=1,
        versions={},
        sha256={name: sha256_of(folder / name) for name in (CONFIG_FILE, TENSORS_FILE, CORES_FILE)},
    )
    sealed = meta.sealed()
    (folder / META_FILE).write_text(sealed.model_dump_json())


def fold_here(checkpoint: Path, output: Path) -> tuple[float, int]:
    """Seconds after imports, and peak bytes beyond what the process held before."""
    import psutil

    from loraover_export import fold_checkpoint

    torch.ones(8, 8, dtype=torch.float64) @ torch.ones(8, 8, dtype=torch.float64)
    before = psutil.Process().memory_info().rss
    started = time.perf_counter()
    fold_checkpoint(checkpoint, output)
    seconds = time.perf_counter() - started
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def convert_with_peft() -> float:
    """Seconds of PEFT's convert_to_lora on one 4096 x 1024 layer."""
    from peft import LoHaConfig, convert_to_lora, get_peft_model

    model = nn.Sequential(nn.Linear(4096, 1024, bias=False))
    adapted = get_peft_model(model, LoHaConfig(r=RANK, target_modules=["0"], init_weights=False))
    started = time.perf_counter()
    convert_to_lora(adapted, rank=RANK, progressbar=False)
    return time.perf_counter() - started


@click.command()
@click.option("--repeats", default=3, show_default=True)
@click.option("--make", type=click.Path(path_type=Path), hidden=True)
@click.option("--fold", "paths", nargs=2, type=click.Path(path_type=Path), hidden=True)
def main(repeats: int, make: Path | None, paths: tuple[Path, Path] | None) -> None:
    """Time the fold of an 8B model's adapter, and PEFT's conversion."""
    if make is not None:
        write_synthetic_checkpoint(make)
        return
    if paths is not None:
        print(json.dumps(fold_here(*paths)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = Path(scratch) / "checkpoint"
        # In a process of its own: the peak of a folding child starts from this one's.
        subprocess.run([sys.executable, "-m", "benchmarks.folding", "--make", str(checkpoint)], check=True)
        adapter_bytes = (checkpoint / TENSORS_FILE).stat().st_size
        runs = []
        for i in range(repeats):
            command = [sys.executable, "-m", "benchmarks.folding", "--fold", str(checkpoint), f"{scratch}/out{i}"]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            runs.append(json.loads(done.stdout.splitlines()[-1]))
    runs.sort()
    seconds, extra = runs[len(runs) // 2]
    peft_seconds = convert_with_peft()
    whole = peft_seconds * LAYERS * len(LINEARS)
    table = Table(
        box=SIMPLE, title=f"Fold of {LAYERS * len(LINEARS) * 2} matrices, adapter of {adapter_bytes / 2**20:.0f} MiB"
    )
    table.add_column("")
    table.add_column("measured", justify="right")
    table.add_row(f"fold and certify, median of {repeats}", f"{seconds:.2f} s")
    table.add_row("extra memory", f"{extra / 2**20:.0f} MiB, {extra / adapter_bytes:.2f} x the adapter")
    table.add_row("PEFT convert_to_lora, one 4096 x 1024 layer", f"{peft_seconds:.2f} s")
    table.add_row(
        f"the same x {LAYERS * len(LINEARS)} layers, by count", f"{whole:.0f} s, {whole / seconds:.0f} x the fold"
    )
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
