"""Random cases: a kind of adapter with odd options, on a base model, and what is done with it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from peft import get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import OPTConfig, OPTForCausalLM

from loraover.adapters.convert.methods import METHODS
from loraover.adapters.convert.methods.base import Refused

from fuzz.oracle import load_plain
from support.make_checkpoint import save_tokenizer
from support.plain_adapter import tiny_decoder
from support.tiny_experts import PARAMETERS, tiny_moe
from support.tiny_models import VOCABULARY, tiny_bert, tiny_gpt2, tiny_llama, tiny_neox, tiny_t5

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Values = Mapping[str, Sequence[Any]]
"""Values that a field may be drawn from, by its name."""


@dataclass(frozen=True)
class Base:
    """A base model to draw."""

    make: Callable[[], Any]
    linear: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    embedding: str = "embed_tokens"
    head: str = "lm_head"
    task: str = "CAUSAL_LM"


def _tiny_opt() -> Any:
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 2}
    config = OPTConfig(vocab_size=VOCABULARY, num_attention_heads=4, max_position_embeddings=80, **sizes)
    return OPTForCausalLM(config).eval()


PRIME = {"hidden_size": 34, "num_attention_heads": 1, "num_key_value_heads": 1, "intermediate_size": 53}
BASES = {
    "llama": Base(tiny_llama),
    "llama of primes": Base(partial(tiny_llama, **PRIME)),
    "tied llama": Base(partial(tiny_llama, tie_word_embeddings=True)),
    "llama with biases": Base(partial(tiny_llama, attention_bias=True, mlp_bias=True)),
    "qwen2": Base(partial(tiny_decoder, "Qwen2")),
    "qwen3 moe": Base(tiny_moe, ("q_proj", "k_proj", "v_proj", "o_proj")),
    "gpt2": Base(tiny_gpt2, ("c_attn", "c_proj", "c_fc"), "wte"),
    "neox": Base(tiny_neox, ("query_key_value", "dense", "dense_h_to_4h"), "embed_in", "embed_out"),
    "opt": Base(_tiny_opt, ("q_proj", "v_proj", "out_proj", "fc1", "fc2")),
    "t5": Base(tiny_t5, ("q", "k", "v", "o", "wi", "wo"), "shared", task="SEQ_2_SEQ_LM"),
    "bert": Base(tiny_bert, ("query", "value", "dense"), "word_embeddings", "classifier", "SEQ_CLS"),
}

ANY: Values = {
    "r": (1, 2, 3, 5, 40),
    "layers_to_transform": ([0], [1], 1),
    "rank_pattern": ({"q_proj": 7}, {r"^.*\.1\..*": 1}, {"down_proj": 1, "fc1": 2}),
    "alpha_pattern": ({"q_proj": 7}, {r".*\.0\..*": 3}),
    "bias": ("all",),
    "fan_in_fan_out": (True,),
    "modules_to_save": (["lm_head"], ["norm"], ["classifier"], ["score"]),
    "task_type": (None, "SEQ_CLS", "FEATURE_EXTRACTION"),
}
"""Fields of many kinds."""

LORA: Values = {
    "lora_alpha": (1, 3, 16),
    "use_rslora": (True,),
    "use_dora": (True,),
    "init_lora_weights": ("gaussian", "pissa", "pissa_niter_2", "olora", "orthogonal"),
    "trainable_token_indices": ([3, 61], [0]),
    "lora_bias": (True,),
    "layer_replication": ([[0, 1], [0, 2]],),
    "alora_invocation_tokens": ([5],),
    "ensure_weight_tying": (True,),
}
OFT: Values = {
    "oft_block_size": (2, 4, 8),
    "block_share": (True,),
    "coft": (True,),
    "use_cayley_neumann": (False,),
    "num_cayley_neumann_terms": (2, 3),
}
OWN: dict[str, Values] = {
    "LORA": LORA,
    "ADALORA": {"init_r": (1, 4, 6), "lora_alpha": (3, 16)},
    "BOFT": {"boft_block_size": (2, 4), "boft_n_butterfly_factor": (1, 2)},
    "C3A": {"block_size_pattern": ({"q_proj": 4},)},
    "DEFT": {"decomposition_method": ("qr",), "alpha": (2, 0.5), "para": (True,)},
    "DELORA": {"delora_lambda": (1, 3), "lambda_pattern": ({"q_proj": 5},)},
    "FOURIERFT": {"scaling": (3.0,), "random_loc_seed": (5,), "n_frequency_pattern": ({"q_proj": 50},)},
    "GLORA": {"config_A_B": ("vector", "constant", "none"), "config_C": ("vector", "none"), "config_D_E": ("vector",)},
    "GRALORA": {"gralora_k": (1, 2, 4), "hybrid_r": (0, 3), "alpha": (5,)},
    "HRA": {"apply_GS": (True,)},
    "LOHA": {"alpha": (7,)},
    "LOKR": {"alpha": (3,), "decompose_both": (True,), "decompose_factor": (2, 6)},
    "MISS": {"mini_r": (4,), "init_weights": ("bat", "mini")},
    "OFT": OFT,
    "OSF": {"effective_rank": (1, 8, 28), "rank_pattern": ({"q_proj": 3},)},
    "PEANUT": {"depth": (1, 2), "act_fn": ("tanh", "gelu"), "scaling": (0.5,)},
    "PVERA": {"save_projection": (False,), "projection_prng_key": (7,)},
    "RANDLORA": {"save_projection": (False,), "sparse": (True,), "very_sparse": (True,), "randlora_alpha": (3,)},
    "ROAD": {"variant": ("road_2", "road_4")},
    "SUPERTUNING": {"sparsity": (0.5,), "lora_alpha": (4,), "select_top": (False,)},
    "UNILORA": {"save_indices": (True,), "proj_seed": (3,)},
    "VBLORA": {"topk": (1, 3), "save_only_topk_weights": (True,)},
    "VERA": {"save_projection": (False,), "projection_prng_key": (7,)},
}
"""Fields of one kind."""

NEEDED: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10},
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 300},
    "OFT": {"r": 0, "oft_block_size": 4},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 2},
    "TRAINABLE_TOKENS": {"token_indices": [5, 2, 63]},
    "VBLORA": {"num_vectors": 16, "vector_length": 4},
    **{kind: {"num_virtual_tokens": 3} for kind in ("CARTRIDGE", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING")},
}
"""Fields without which a kind does not fit a tiny model."""

FILLS = {"normal": 0.1, "small": 1e-5, "tiny": 1e-9, "dependent": 0.1}
"""Size of the draws by the name of a way to fill parameters; the columns of a "dependent" one are almost the same."""
CONVERTED = [kind for kind, method in METHODS.items() if not isinstance(method, Refused)]
VERBS: Values = {
    "convert": ({}, {"approximate_to_rank": 2}, {"dtype": "bf16"}, {"dtype": "fp16"}),
    "combine": ({"dtype": "fp32"}, {"dtype": "fp16"}),
    "shrink": ({"rank": 1}, {"energy": 0.9}),
    "merge": ({},),
    "vllm": ({"dtype": "fp32"}, {"dtype": "bf16"}, {"dtype": "fp16"}),
    "gguf": ({"dtype": "fp32"}, {"dtype": "fp16"}),
    "mlx": ({"dtype": "fp32"}, {"dtype": "fp16"}),
    "onnx": ({"mode": "merged"}, {"mode": "swappable"}),
    "check": ({},),
}


@dataclass(frozen=True)
class Case:
    """One adapter and what is done with it; and a line of the regressions.

    Args:
        seed: Seed of the draws of its tensors.
        kind: PEFT's name of the kind.
        base: Name of the base model, of `BASES`.
        base_dtype: Data type that the base model is stored in.
        options: Fields of PEFT's configuration.
        verb: What is done with it, of `VERBS`.
        arguments: Arguments of that.
        fill: How trained parameters are filled, of `FILLS`.
        stored: Data type that the adapter is stored in.
        edits: Fields of `adapter_config.json` that are changed after PEFT has saved the adapter.
        rows: Whether the file also holds the embedding with changed rows.
    """

    seed: int
    kind: str
    base: str
    options: dict[str, Any]
    verb: str
    arguments: dict[str, Any] = field(default_factory=dict)
    base_dtype: str = "fp32"
    fill: str = "normal"
    stored: str = "fp32"
    edits: dict[str, Any] = field(default_factory=dict)
    rows: bool = False

    @property
    def task(self) -> str | None:
        """PEFT's name of the task that the model is loaded for."""
        found: str | None = self.options["task_type"] or BASES[self.base].task
        return found


def draw(seed: int) -> Case:
    """Return the case of a seed."""
    random = Random(seed)
    kind = random.choice(["LORA"] * 60 + CONVERTED * 2 + list(METHODS))
    name = random.choice(list(BASES))
    base, fields = BASES[name], PEFT_TYPE_TO_CONFIG_MAPPING[kind].__dataclass_fields__
    options = {"task_type": base.task} | NEEDED.get(kind, {})
    if "target_modules" in fields:
        options["target_modules"] = _targets(random, base, kind)
    for pool in (ANY, OWN.get(kind, {})):
        known = [key for key in pool if key in fields]
        for key in random.sample(known, min(len(known), random.choice((0, 1, 1, 2)))):
            options[key] = random.choice(pool[key])
    if name == "qwen3 moe" and kind == "LORA" and random.random() < 0.6:
        options["target_parameters"] = PARAMETERS[: random.choice((1, 2))]
    has_rows = kind == "LORA" and random.random() < 0.1
    if has_rows:
        options["target_modules"] = [random.choice(base.linear), base.embedding]
    if "exclude_modules" in fields and random.random() < 0.1:
        options["exclude_modules"] = [random.choice(base.linear)]
    verb = random.choice(list(VERBS) + ["convert"] * 4) if kind == "LORA" else "convert"
    return Case(
        seed=seed,
        kind=kind,
        base=name,
        options=options,
        verb=verb,
        arguments=random.choice(VERBS[verb]),
        base_dtype=random.choice(("fp32", "fp32", "bf16", "fp16")),
        fill=random.choice(["normal"] * 4 + list(FILLS)),
        stored=random.choice(("fp32", "fp32", "bf16", "fp16")),
        edits=_edits(random, base) if random.random() < 0.15 else {},
        rows=has_rows,
    )


def _targets(random: Random, base: Base, kind: str) -> Any:
    if kind == "TRAINABLE_TOKENS":
        return [base.embedding]
    names = random.sample(base.linear, random.randint(1, 3))
    others: list[Any] = [[*names, base.embedding], [*names, base.head], "all-linear", rf".*\.({'|'.join(names)})"]
    return random.choice(others) if random.random() < 0.35 else names


def _edits(random: Random, base: Base) -> dict[str, Any]:
    return random.choice(
        [
            {"layers_to_transform": [0]},
            {"exclude_modules": [random.choice(base.linear)]},
            {"target_modules": [random.choice(base.linear)]},
            {"task_type": "NO_SUCH_TASK"},
            {"task_type": None},
            {"rank_pattern": {f"(?i){random.choice(base.linear)}": 2}},
        ]
    )


def save_base(case: Case, folder: Path) -> Path:
    """Write the base model of a case into a folder of bases, unless it is there; returns its folder."""
    path = folder / f"{case.base}-{case.base_dtype}".replace(" ", "-")
    if not path.exists():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            BASES[case.base].make().to(DTYPES[case.base_dtype]).save_pretrained(path)
        save_tokenizer(path)
    return path


def save_adapter(case: Case, base: Path, folder: Path) -> Path:
    """Write the adapter of a case as PEFT would after training, and edit its files; returns `folder`."""
    config = PEFT_TYPE_TO_CONFIG_MAPPING[case.kind](**case.options)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(case.seed)
        model = get_peft_model(load_plain(base, case.task), config)
        _fill(model, case.fill)
        model.save_pretrained(folder)
    file, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | case.edits))
    tensors = {
        # A rounded copy of a frozen weight is left out, and PEFT would load it.
        key: tensor
        if key.endswith(".base_layer.weight") or not tensor.is_floating_point()
        else tensor.to(DTYPES[case.stored])
        for key, tensor in load_file(file).items()
    }
    if case.rows:
        weight = load_plain(base, case.task).get_input_embeddings().weight.detach()
        name = next(path for path, _ in model.named_modules() if path.endswith(BASES[case.base].embedding))
        tensors[f"{name}.base_layer.weight"] = weight + 0.1 * (torch.arange(len(weight)) % 7 == 1)[:, None]
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


@torch.no_grad()
def _fill(model: nn.Module, fill: str) -> None:
    """Move every trained parameter."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape)
            if fill == "dependent" and parameter.ndim == 2:
                noise = noise[:, :1] + 1e-5 * noise
                parameter.zero_()
            parameter.add_(FILLS[fill] * noise)
