"""Small LoRA-Over checkpoints on disk: trained for a few steps, and damaged on purpose."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from loraover import LoraOverConfig, OverParameterization, Probe, read_checkpoint, write_checkpoint
from loraover.checkpoint.training_state import restore

from oracles.contraction import Array, chain_matrix, eigen_matrix, mpo_matrix, svd_matrix
from strategies import full_bonds
from support.tiny_models import VOCABULARY, fill_b, tiny_llama, token_ids

ATTENTION = ["q_proj", "v_proj"]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EMBEDDING = ["embed_tokens", "q_proj"]
MODES = {
    1: (1, 1, 1),
    2: (1, 2, 1),
    4: (2, 2, 1),
    8: (2, 2, 2),
    16: (2, 4, 2),
    32: (4, 4, 2),
    48: (4, 4, 3),
    64: (4, 4, 4),
}
"""How an MPO of three cores splits a dimension unless told otherwise: part of the file format."""

SERVABLE = {"head_dim": 32, "num_key_value_heads": 1}
"""Options of a tiny Llama that vLLM and onnxruntime-genai take."""
WORDS = ["the", "train", "leaves", "at", "nine", "and", "a", "farmer", "has", "17", "sheep", "red", "blue"]

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]


@dataclass(frozen=True)
class Made:
    """A checkpoint on disk and the model that wrote it."""

    base: Path
    path: Path
    model: Any
    over: OverParameterization
    optimizer: Optimizer

    @torch.no_grad()
    def logits(self) -> Tensor:
        return logits(self.model)


def adamw(parameters: Iterable[nn.Parameter]) -> Optimizer:
    return AdamW(parameters, lr=1e-2)


def make_checkpoint(
    folder: Path,
    *,
    config: LoraOverConfig | None = None,
    dtype: torch.dtype = torch.float32,
    steps: int = 2,
    total: int | None = None,
    tokenizer: bool = False,
    make_optimizer: MakeOptimizer = adamw,
    base_options: Mapping[str, Any] | None = None,
    **lora: Any,
) -> Made:
    """A tiny Llama in `folder/base`, and a checkpoint of its adapter in `folder/checkpoint`.

    B starts from non-zero draws, and training moves A and B through their cores.

    Args:
        dtype: Data type of the base model and the adapter.
        steps: Optimizer steps.
        total: Steps of the run that these steps begin, for a dynamic schedule.
        tokenizer: Save a word-level tokenizer beside the base model.
        base_options: Fields of LlamaConfig.
        lora: Options of LoraConfig; rank 4 on q_proj and v_proj otherwise.
    """
    base = folder / "base"
    tiny_llama(**(base_options or {})).to(dtype).save_pretrained(base)
    if tokenizer:
        save_tokenizer(base)
    model = lora_model(base, dtype, **lora)
    config = config or LoraOverConfig(seed=5)
    bases = config.make_decomposition().bases
    probe = calibration(model) if bases is not None and bases.calibrates else None
    over = OverParameterization(model, config, steps=total, probe=probe)
    optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad])
    over.attach(optimizer)
    train(model, optimizer, range(steps))
    path = folder / "checkpoint"
    save(path, model, over, step=steps)
    return Made(base, path, model, over, optimizer)


def calibration(model: Any, batches: int = 2) -> Probe:
    """Batches of next-token prediction that training does not see."""
    ids = [token_ids(seed=200 + batch) for batch in range(batches)]
    return Probe(model, [{"input_ids": each, "labels": each} for each in ids])


def lora_model(base: Path, dtype: torch.dtype = torch.float32, **lora: Any) -> Any:
    """The base model with an untrained adapter whose B is not zero."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    options = {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "task_type": "CAUSAL_LM"} | lora
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        wrapped = get_peft_model(model, LoraConfig(**options), autocast_adapter_dtype=False)
    fill_b(wrapped, seed=2)
    return wrapped


def reopened(
    made: Made,
    make_optimizer: MakeOptimizer,
    config: LoraOverConfig | None = None,
    *,
    total: int | None = None,
    autocast_adapter_dtype: bool = False,
) -> Made:
    """Resume a checkpoint as a new process would: base model, adapter, optimizer, cores."""
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(made.base, dtype=made.model.dtype)
    model = PeftModel.from_pretrained(base, made.path, is_trainable=True, autocast_adapter_dtype=autocast_adapter_dtype)
    over = OverParameterization(model, config or made.over.config, steps=total, inject=False)
    optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad])
    restore(over, read_checkpoint(made.path))
    over.attach(optimizer)
    return Made(made.base, made.path, model, over, optimizer)


def train(model: Any, optimizer: Optimizer, steps: Iterable[int]) -> None:
    """Take steps of next-token prediction on random tokens, with another batch in each step."""
    model.train()
    for step in steps:
        ids = token_ids(seed=step)
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    model.eval()


def save(path: Path, model: Any, over: OverParameterization, *, step: int) -> None:
    """What a training script does: PEFT saves the adapters, LoRA-Over adds each one's cores."""
    model.save_pretrained(path)
    for adapter in dict.fromkeys(site.adapter for site in over.sites.values()):
        write_checkpoint(path if adapter == "default" else path / adapter, over, step=step, adapter=adapter)


def save_tokenizer(folder: Path) -> None:
    """One token for each of a few words, and one for all others."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    assert len(vocabulary) <= VOCABULARY
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


@torch.no_grad()
def logits(model: Any, seed: int = 100) -> Tensor:
    """(sequences, tokens, vocabulary) on tokens that training has not seen."""
    output: Tensor = model(input_ids=token_ids(seed=seed, batch=3, length=7)).logits
    return output


def cores_of(over: OverParameterization) -> dict[str, Tensor]:
    return {
        f"{name}.core.{k}": group.core(k, i).clone()
        for name, (group, i) in over.injected.items()
        for k in range(len(group.stacks))
    }


def oracle_matrices(path: Path, dtype: npt.DTypeLike = np.float64) -> dict[str, Array]:
    """Every over-parameterised matrix of a checkpoint, by tensor key, contracted by the oracles in that dtype.

    Reads the JSON itself; an MPO needs three cores and full bonds.
    """
    meta = json.loads((path / "loraover.json").read_text())
    tensors = load_file(path / "loraover.safetensors")
    given = {int(size): tuple(split) for size, split in meta["config"]["options"].get("modes", {}).items()}
    modes = MODES | given
    matrices = {}
    for site in meta["sites"]:
        name, m, n = site["name"], site["m"], site["n"]
        owners = {int(k): owner for k, owner in site["shares"].items()}
        keys = (f"{owners.get(k, name)}.core.{k}" for k in range(len(tensors)))
        cores = [tensors[key].double().numpy().astype(dtype) for key in takewhile(tensors.__contains__, keys)]
        match meta["config"]["decomposition"]:
            case "mpo":
                matrix = mpo_matrix(_as_tensors(cores, modes[m], modes[n]))
            case "svd":
                matrix = svd_matrix(cores)
            case "chain":
                matrix = chain_matrix(cores)
            case "eigen":
                tokens = {"long": "none"} if name.endswith("lora_embedding_A") else {}
                matrix = eigen_matrix(_as_blocks(cores, m, n, meta["config"]["options"] | tokens))
        matrices[f"base_model.model.{name}" + ("" if "lora_embedding_" in name else ".weight")] = matrix
    return matrices


def _as_tensors(cores: list[Array], rows: tuple[int, ...], columns: tuple[int, ...]) -> list[Array]:
    """The cores' 2-D unfoldings as (R_k, m_k, n_k, R_{k+1})."""
    bonds = (1, *full_bonds(rows, columns), 1)
    return [core.reshape(bonds[k], rows[k], columns[k], bonds[k + 1]) for k, core in enumerate(cores)]


def _as_blocks(cores: list[Array], m: int, n: int, options: Mapping[str, Any]) -> list[Array]:
    """The blocks of U, the centre and the blocks of V, with an identity for a side that has no basis."""
    found = list(cores)
    for at, is_short, length in ((0, m <= n, m), (2, m > n, n)):
        if options.get("short" if is_short else "long", "gradient") == "none":
            found.insert(at, np.eye(length, dtype=cores[0].dtype)[None])
        else:
            found[at] = found[at].reshape(-1, found[at].shape[-1], found[at].shape[-1])
    return found


def nearest(x: Array, dtype: str) -> Array:
    """Float64 elements rounded to the nearest number of a storage type, ties to even, as float64.

    Exact: a division by the power of two that spaces the type's numbers, `rint`, and a multiplication.
    """
    digits, least_exponent = {"fp32": (24, -126), "bf16": (8, -126), "fp16": (11, -14)}[dtype]
    _, exponent = np.frexp(x)  # x = f 2^e with f in [0.5, 1), so the leading bit weighs 2^(e - 1)
    spacing = np.ldexp(1.0, np.maximum(exponent - 1, least_exponent) - (digits - 1))
    rounded: Array = np.rint(x / spacing) * spacing
    return rounded


def numpy64(tensor: Tensor) -> npt.NDArray[np.float64]:
    """A tensor's numbers as float64."""
    array: npt.NDArray[np.float64] = tensor.detach().double().cpu().numpy()
    return array


def edit_tensors(file: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Rewrite a safetensors file after `change` has edited its tensors in place."""
    tensors = load_file(file)
    change(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file, metadata={"format": "pt"})


def edit_json(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite a JSON file after `change` has edited its object in place."""
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def reseal(checkpoint: Path) -> None:
    """Correct every checksum of an edited checkpoint, by the format's rules and without our code."""

    def seal(meta: dict[str, Any]) -> None:
        meta["sha256"] = {
            name: hashlib.sha256((checkpoint / name).read_bytes()).hexdigest()
            for name in ("adapter_config.json", "adapter_model.safetensors", "loraover.safetensors")
        }
        meta["digest"] = digest(meta)

    edit_json(checkpoint / "loraover.json", seal)


def digest(meta: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON with an empty digest."""
    return hashlib.sha256(json.dumps({**meta, "digest": ""}, sort_keys=True).encode()).hexdigest()


def tree(folder: Path) -> dict[str, str]:
    """What lies in a folder, by relative path: checksums of files, targets of links."""

    def content(path: Path) -> str:
        if path.is_symlink():
            return f"-> {path.readlink()}"
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"

    return {str(path.relative_to(folder)): content(path) for path in sorted(folder.rglob("*"))}
