"""Memory that large models would need for training, in Markdown: python docs/predict_sizes.py. Nothing is loaded.

The figures are those of `loraover train --plan` for published shapes, on GPUs that were not there: they are predicted.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from loraover.training.plan import TrainingPlan, make_plan
from loraover.training.recipe import Recipe

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8}
SHAPES = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
"""Sizes of Llama 3.1's configurations."""
CARDS = {"8B": ((24, 1), (80, 1)), "70B": ((80, 8),)}
"""Gigabytes of a GPU, and number of GPUs over which FSDP2 spreads the model and its LoRA; cores are in each."""
FORMS = {"8B": (None, "nf4"), "70B": (None,)}
"""Forms of the base; FSDP2 was not tried on a quantised one."""
RANK, TOKENS, GB = 16, 2048, 10**9


def plan_of(
    size: str, method: str, form: str | None, memory: int | None = None, gpus: int | None = None
) -> TrainingPlan:
    """Return the plan of one example in a micro-batch, with gradient checkpointing.

    Args:
        size: Key of `SHAPES`.
        method: Method of the recipe.
        form: Form in which the base is quantised; None: bfloat16.
        memory: Gigabytes of a GPU; None: that of this machine.
        gpus: Number of GPUs, over which FSDP2 spreads the model if there are several.
    """
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(LLAMA | SHAPES[size]))
        recipe = {
            "model": folder,
            "model_init": {"quantization": form},
            "method": method,
            "distributed": {"engine": "fsdp2" if gpus and gpus > 1 else "ddp"},
            "data": {"train": "word-problems"},
            "lora": {"r": RANK, "lora_alpha": 2 * RANK},
            "training": {
                "max_steps": 1,
                "per_device_train_batch_size": 1,
                "max_length": TOKENS,
                "bf16": True,
                "gradient_checkpointing": True,
            },
        }
        return make_plan(Recipe.model_validate(recipe), gpus=gpus, gpu_memory=memory)


def table_rows(size: str) -> Iterator[str]:
    """Yield a row for each method and form of the base."""
    for method, form in ((method, form) for method in ("lora", "lora-over") for form in FORMS[size]):
        plan = plan_of(size, method, form)
        trained = plan.adapter + plan.cores + plan.gradients + plan.optimizer_states
        fits = []
        for card, count in CARDS[size]:
            on_each = plan_of(size, method, form, card, count)
            fits.append(f"{on_each.in_all / GB:.1f} GB of {card}" + ("" if on_each.fits else ": does not fit"))
        cells = [f"{part / GB:.1f} GB" for part in (plan.weights, trained, plan.activations or 0)]
        yield f"| {size}, `{method}` | {form or 'bf16'} | {' | '.join(cells)} | *predicted*: {'; '.join(fits)} |"


def main() -> None:
    """Print the table."""
    print(f"| r = {RANK}, 1 x {TOKENS:,} tokens | base in | weights | trained | activations | on each GPU |")
    print("| --- | --- | ---: | ---: | ---: | --- |")
    for size in SHAPES:
        print("\n".join(table_rows(size)))


if __name__ == "__main__":
    main()
