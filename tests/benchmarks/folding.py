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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from rich.box import SIMPLE
from rich.table import Table
from torch import Tensor, nn

from loraover import LoraOverConfig
from loraover.checkpoint.checkpoint import CORES_FILE, META_FILE, Meta, SiteRecord
from loraover.checkpoint.peft_adapter import CONFIG_FILE, TENSORS_FILE, site_key
from loraover.checkpoint.tensor_file import save_tensors, sha256_of

RANK = 16


@dataclass(frozen=True)
class Llama:
    """Shapes of a Llama's linear layers.

    Args:
        layers: Number of layers.
        hidden: Width of the residual stream, which is also that of all queries.
        values: Width of all keys, and of all values.
        intermediate: Width inside the feed-forward network.
    """

    layers: int
    hidden: int
    values: int
    intermediate: int

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Output and input width of each linear layer of one layer, by its name."""
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (self.values, self.hidden),
            "self_attn.v_proj": (self.values, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }

    @property
    def sites(self) -> int:
        """Number of A and B matrices."""
        return 2 * self.layers * len(self.linears)


LLAMA_8B = Llama(layers=32, hidden=4096, values=1024, intermediate=14336)


def write_synthetic_checkpoint(folder: Path, shapes: Llama = LLAMA_8B) -> None:
    """Write a checkpoint of random matrices in a Llama's shapes, r = 16."""
    config = LoraOverConfig(seed=0)
    decomposition = config.make_decomposition()
    draw = torch.Generator().manual_seed(0)
    matrices: dict[str, Tensor] = {}
    cores: dict[str, Tensor] = {}
    sites = []
    for layer in range(shapes.layers):
        for linear, (out_features, in_features) in shapes.linears.items():
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


def measure(repeats: int = 3) -> Iterator[Table]:
    """Time the fold of an 8B model's adapter, and PEFT's conversion."""
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = Path(scratch) / "checkpoint"
        # In a process of its own: the peak of a folding child starts from this one's.
        subprocess.run([sys.executable, "-m", "benchmarks.folding", "--make", str(checkpoint)], check=True)
        adapter_bytes = (checkpoint / TENSORS_FILE).stat().st_size
        runs = []
        for i in range(repeats):
            command = [sys.executable, "-m", "benchmarks.folding", "--fold", str(checkpoint), f"{scratch}/out{i}"]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            runs.append(json.loads(done.stdout.splitlines()[-1]))
    runs.sort()
    seconds, extra = runs[len(runs) // 2]
    peft_seconds = convert_with_peft()
    linears = LLAMA_8B.sites // 2
    whole = peft_seconds * linears
    table = Table(box=SIMPLE, title=f"Fold of {LLAMA_8B.sites} matrices, adapter of {adapter_bytes / 2**20:.0f} MiB")
    table.add_column("")
    table.add_column("measured", justify="right")
    table.add_row(f"fold and certify, median of {repeats}", f"{seconds:.2f} s")
    table.add_row("extra memory", f"{extra / 2**20:.0f} MiB, {extra / adapter_bytes:.2f} x the adapter")
    table.add_row("PEFT convert_to_lora, one 4096 x 1024 layer", f"{peft_seconds:.2f} s")
    table.add_row(f"the same x {linears} layers, by count", f"{whole:.0f} s, {whole / seconds:.0f} x the fold")
    yield table


@click.command()
@click.option("--make", type=click.Path(path_type=Path))
@click.option("--fold", "paths", nargs=2, type=click.Path(path_type=Path))
def main(make: Path | None, paths: tuple[Path, Path] | None) -> None:
    """Make the checkpoint, or fold it, in this process."""
    if make is not None:
        write_synthetic_checkpoint(make)
    if paths is not None:
        print(json.dumps(fold_here(*paths)))


if __name__ == "__main__":
    main()
