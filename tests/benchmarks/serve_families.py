"""Serve a tiny model of every family with the real vLLM, its adapter written by the command, and compare with PEFT.

A server takes most of a minute to start, so the suite serves one model only; this serves the others, by hand:

    cd tests && ../.venv/bin/python -m benchmarks.serve_families
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from peft import PeftModel
from transformers import AutoModelForCausalLM

from loraover.common.command_line import run
from loraover_export.cli import cli
from loraover_serve.vllm.server import VllmServerConfig, serve_vllm

from support.agreement import agreement
from support.plain_adapter import FAMILIES, make_adapter
from support.tiny_hub import tiny_tokenizer
from support.tiny_models import token_ids
from support.vllm_command import vllm_command


def serve(family: str, folder: Path, executable: str) -> None:
    """One line: largest logprob difference from PEFT with the adapter, without it, and what the adapter changes."""
    adapter, base = make_adapter(folder, family), folder / "base"
    tiny_tokenizer().save_pretrained(base)
    assert run(cli, ["vllm", str(adapter), "-o", str(folder / "out"), "--dtype", "fp32"]) == 0
    config = VllmServerConfig(
        model=str(base),
        adapters={"adapter": folder / "out"},
        max_lora_rank=8,
        dtype="float32",
        options=("--max-model-len", "128", "--enforce-eager"),
        environment={"VLLM_CPU_KVCACHE_SPACE": "1"},
    )
    prompts: list[list[int]] = token_ids(batch=8, length=12).tolist()
    with serve_vllm(config, folder / "log", executable=executable) as client:
        plain, adapted = (client.complete_batch(name, prompts, max_tokens=32) for name in (str(base), "adapter"))
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    without, effect = agreement(model, prompts, plain), agreement(model, prompts, adapted)
    found = agreement(PeftModel.from_pretrained(model, folder / "out").eval(), prompts, adapted)
    equal = f"{found.continuations - len(found.gaps)} of {found.continuations} continuations equal"
    differences = f"largest difference {found.largest:.1e} nats, on the base model {without.largest:.1e}"
    print(f"{family}: {equal}, {differences}; the adapter changes {effect.largest:.3f} nats", flush=True)


def main() -> None:
    executable = str(vllm_command())
    for family in FAMILIES:
        with TemporaryDirectory() as folder:
            serve(family, Path(folder), executable)


if __name__ == "__main__":
    main()
