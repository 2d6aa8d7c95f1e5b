"""Sites: the LoRA matrices of a PEFT model that can be over-parameterised."""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, Literal

from packaging.version import Version
from torch import Tensor, nn
from torch.optim import Optimizer

from loraover.common.errors import ConfigError, ShapeError
from loraover.overparam.expert_part import FUSED, ExpertPart, MatrixName, part_of, without_base_layers
from loraover.overparam.sharding import Piece, assign, is_sharded, local, piece_of, summed, whole_shape

# Levels that torch.compile, activation checkpointing and FSDP put into a module's path.
WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


@dataclass(frozen=True, eq=False)
class Site:
    """A or B matrix of a module and an adapter.

    Args:
        name: Name such as "model.layers.0.mlp.up_proj.lora_A". Where several adapters are trained, adapters other
            than "default" prefix it with "<adapter>:". It does not depend on wrappers such as DDP or torch.compile.
        module: Path of the adapted module in the base model.
        adapter: PEFT's adapter name.
        matrix: "A" (r, in_features) or "B" (out_features, r).
        parameter: PEFT's parameter, of shape (m, n), or the stack that holds the matrices of all experts.
        aliases: Parameters that are transposed views of the same memory, as PEFT's `ensure_weight_tying` makes
            them for an output layer that is tied to the embedding.
        part: Place of one expert's matrix in the stack; None if the parameter is the matrix.
        piece: What this process's optimizer holds of the matrix, where DeepSpeed's ZeRO has cut it.
    """

    name: str
    module: str
    adapter: str
    matrix: Literal["A", "B"]
    parameter: nn.Parameter
    aliases: list[nn.Parameter] = field(default_factory=list)
    part: ExpertPart | None = None
    piece: Piece | None = None

    @property
    def tensor(self) -> Tensor:
        """The matrix (m, n) as the model holds it, or a view of it in its stack; sharded if the parameter is."""
        return self.of(self.parameter)

    @property
    def values(self) -> Tensor:
        """The matrix (m, n), detached; where DeepSpeed's ZeRO has cut it, a full copy."""
        if self.piece is None:
            return self.tensor.detach()
        return summed({"": self.held})[""]

    @property
    def held(self) -> Tensor:
        """This process's part of the matrix: a shard, or the matrix with zeros where other processes hold it."""
        return local(self.tensor) if self.piece is None else self.piece.spread(self.piece.values)

    @property
    def is_cut(self) -> bool:
        """Whether each process holds a part of the matrix."""
        return self.piece is not None or is_sharded(self.parameter)

    def of(self, tensor: Tensor) -> Tensor:
        """Return this matrix's part of a tensor that is shaped like the parameter, a view."""
        return part_of(self.part, tensor)

    def state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the optimizer's state of this matrix, by the optimizer's own keys."""
        state = optimizer.state.get(self.parameter, {})
        shape = self.parameter.shape
        return {k: self.of(v) if isinstance(v, Tensor) and v.shape == shape else v for k, v in state.items()}

    def gradient(self) -> Tensor | None:
        """Return the summed gradient of the parameter and its aliases, (m, n), dense; sharded if the parameter is."""
        gradients = [
            self.of(p.grad if p is self.parameter else p.grad.mT) for p in self.holders() if p.grad is not None
        ]
        dense = [g.to_dense() if g.is_sparse else g for g in gradients if g is not None]
        total = sum(dense[1:], dense[0]) if dense else None
        return total if total is None or self.part is None else total.clone()  # clear_gradient overwrites the stack's

    def clear_gradient(self) -> None:
        """Set the gradients of the parameter and its aliases to None, or to zero in an expert's part of a stack."""
        for parameter in self.holders():
            if self.part is None:
                parameter.grad = None
            elif parameter.grad is not None:
                self.part.of(parameter.grad).zero_()

    def holders(self) -> tuple[nn.Parameter, ...]:
        """Return all parameters that share the matrix's memory: the parameter and its aliases."""
        return (self.parameter, *self.aliases)

    @property
    def kind(self) -> str:
        """Type of the module: the last part of its path, e.g. "q_proj"."""
        return self.module.rpartition(".")[2]

    @property
    def layer(self) -> str:
        """Layer of the module; see `layer_of`."""
        return layer_of(self.module)

    @property
    def path(self) -> str:
        """Name without the adapter's prefix, as a checkpoint of that adapter spells it."""
        return self.name.removeprefix(f"{self.adapter}:")

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (m, n) of the matrix."""
        m, n = whole_shape(self.parameter) if self.part is None else self.values.shape
        return m, n

    @property
    def size(self) -> int:
        """Number of elements of the matrix."""
        return math.prod(self.shape)


def write_matrices(sites: Sequence[Site], values: Tensor) -> None:
    """Write matrices (G, m, n) into the parameters of G sites of one type; a process keeps its part of a cut one."""
    if sites[0].piece is None:
        assign([site.tensor for site in sites], values)
        return
    for site, value in zip(sites, values, strict=True):
        assert site.piece is not None  # ZeRO cuts all or none
        site.piece.write(value)


def layer_of(module: str) -> str:
    """Return the first number in a module's path, with "encoder" or "decoder" in front if the path has it; else "-"."""
    parts = module.split(".")
    number = next((part for part in parts if part.isdigit()), "-")
    return " ".join([*(part for part in parts if part in ("encoder", "decoder")), number])


def find_sites(model: nn.Module) -> dict[str, Site]:
    """Find every trainable A and B matrix of a model, by name, in module order.

    A matrix that several modules share is listed once, under its first module. A parameter that holds all experts of
    a layer has a site for each expert's A and B, whose module is named like "model.layers.0.mlp.experts.3.down_proj".

    Raises:
        ConfigError: The model has no LoRA layer or no trainable one, holds several models that are trained, or has a
            LoRA that is not a plain pair of matrices (DoRA and other variants, AdaLoRA, convolutions,
            nn.MultiheadAttention), or one of experts that is sharded or that a PEFT before 0.19 made.
    """
    sites: dict[str, Site] = {}
    seen: set[int] = set()
    by_memory: dict[int, Site] = {}
    layers = lora_layers(model)
    outside = _trained_layer(model, layers.values())
    if outside is not None:
        root = peft_root(model)
        where = next(path for path, module in model.named_modules() if module is root)
        raise ConfigError(
            f"{outside}: this LoRA is trained, but lies outside of the PeftModel at {where!r}, so it would get no "
            "cores. Freeze it, or give OverParameterization one of the two models; for both, make one each, with an "
            "optimizer each."
        )
    is_alone = len({adapter for layer in layers.values() for _, _, adapter, _ in _trained_matrices(layer)}) == 1
    for module, layer in layers.items():
        _refuse_unsupported(module, layer)
        for kind, matrix, adapter, parameter in _trained_matrices(layer):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            prefix = "" if adapter == "default" or is_alone else f"{adapter}:"
            for path, part in matrices_of(module, layer, matrix):
                piece = piece_of(parameter)
                site = Site(f"{prefix}{path}.{kind}", path, adapter, matrix, parameter, part=part, piece=piece)
                if len(whole_shape(parameter)) != 2:
                    raise ShapeError(f"{site.name}: expected a matrix, found shape {tuple(parameter.shape)}.")
                held = local(site.tensor.detach())
                pointer = 0 if held.is_meta else held.data_ptr()
                if pointer and pointer in by_memory:
                    tied = by_memory[pointer]
                    layout = tuple(parameter.shape)[::-1], parameter.stride()[::-1]
                    if layout != (tied.shape, tied.parameter.stride()):
                        raise ConfigError(
                            f"{site.name} shares memory with {tied.name}, but is not its transpose; untie them."
                        )
                    tied.aliases.append(parameter)
                    continue
                sites[site.name] = by_memory[pointer] = site
    if not layers:
        raise ConfigError("the model has no LoRA layers; wrap it with peft.get_peft_model(model, LoraConfig(...)).")
    if not sites:
        raise ConfigError("none of the model's LoRA matrices requires a gradient; activate an adapter for training.")
    return sites


def _trained_matrices(layer: Any) -> Iterator[tuple[str, Literal["A", "B"], str, nn.Parameter]]:
    """Yield PEFT's name, "A" or "B", adapter and parameter of each trainable matrix of a layer."""
    pairs: tuple[tuple[str, Any, Literal["A", "B"]], ...] = (
        ("lora_A", layer.lora_A, "A"),
        ("lora_B", layer.lora_B, "B"),
        ("lora_embedding_A", layer.lora_embedding_A, "A"),
        ("lora_embedding_B", layer.lora_embedding_B, "B"),
    )
    for kind, holders, matrix in pairs:
        for adapter, holder in holders.items():
            parameter = holder if isinstance(holder, nn.Parameter) else holder.weight
            if parameter.requires_grad:
                yield kind, matrix, adapter, parameter


def matrices_of(module: str, layer: Any, matrix: MatrixName) -> list[tuple[str, ExpertPart | None]]:
    """Return the module's path and the place in the parameter of each matrix that a layer's A or B holds."""
    from peft.tuners.lora.layer import ParamWrapper

    if not isinstance(layer, ParamWrapper) or layer.parameter_name not in FUSED:
        return [(module, None)]
    owner, experts = without_base_layers(module), layer.num_experts
    return [(f"{owner}.{e}.{layer.parameter_name}", ExpertPart(matrix, e, experts)) for e in range(experts)]


def only_adapter(sites: Iterable[Site]) -> str:
    """Return PEFT's name of the adapter that all these sites belong to; a ConfigError if there are several."""
    adapters = list(dict.fromkeys(site.adapter for site in sites))
    if len(adapters) > 1:
        raise ConfigError(
            f"{len(adapters)} adapters are trained at once ({', '.join(adapters)}), and a checkpoint restores one. "
            "Activate one, or train without the callback, with OverParameterization."
        )
    return adapters[0]


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """Find PEFT's LoRA layers, by module path in the base model."""
    from peft.tuners.lora import LoraLayer

    found = {}
    for path, module in peft_root(model).named_modules():
        if isinstance(module, LoraLayer):
            for wrapper in WRAPPERS:
                path = path.replace(wrapper, "")
            found[path.removeprefix("base_model.model.")] = module
    return found


def base_model_name(model: nn.Module) -> str | None:
    """Return the hub name or folder that transformers loaded the base model from; None for any other model."""
    from peft import PeftModel

    root = peft_root(model)
    base = root.get_base_model() if isinstance(root, PeftModel) else root
    return getattr(base, "name_or_path", None) or None


def peft_root(model: nn.Module) -> nn.Module:
    """Return the PeftModel inside wrappers, or the module into which PEFT has injected an adapter, or the model.

    Of several, the first one that is trained counts, else the first one.
    """
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTuner

    found = [m for m in model.modules() if isinstance(m, PeftModel)]
    found = found or [m for m in model.modules() if "peft_config" in vars(m) and not isinstance(m, BaseTuner)]
    return next(filter(_trained_layer, found), found[0] if found else model)


def _trained_layer(model: nn.Module, known: Iterable[Any] = ()) -> str | None:
    """Return the path of the first trained LoRA layer that is not known, or None."""
    from peft.tuners.lora import LoraLayer

    skipped = set(map(id, known))
    layers = ((path, module) for path, module in model.named_modules() if isinstance(module, LoraLayer))
    return next((path for path, m in layers if id(m) not in skipped and any(_trained_matrices(m))), None)


def _refuse_unsupported(module: str, layer: Any) -> None:
    from peft.tuners.adalora import AdaLoraLayer
    from peft.tuners.lora import layer as peft_layer

    if layer.lora_variant:
        variants = sorted({type(v).__name__ for v in layer.lora_variant.values()})
        raise ConfigError(
            f"{module}: {', '.join(variants)} is not a plain product B A, so it cannot be folded into a plain LoRA. "
            "Use a LoraConfig without DoRA or other variants."
        )
    reasons = {
        peft_layer._ConvNd: "LoRA of a convolution is not supported: A is a kernel, not a matrix. "
        "Leave the layer out of target_modules",
        peft_layer.MultiheadAttention: "LoRA of nn.MultiheadAttention is not supported: its delta is merged into the "
        "weights during the forward. Leave the layer out of target_modules",
        AdaLoraLayer: "AdaLoRA trains B diag(E) A, which is not a plain product B A. Train with a LoraConfig; "
        "`loraover export convert` makes a plain LoRA of an AdaLoRA that is trained already",
    }
    for kind, reason in reasons.items():
        if isinstance(layer, kind):
            raise ConfigError(f"{module}: {reason}.")
    if not isinstance(layer, peft_layer.ParamWrapper):
        return
    if layer.parameter_name not in (*FUSED, "weight") or (layer.parameter_name == "weight" and layer.num_experts > 1):
        raise ConfigError(
            f"{module}: LoRA through target_parameters is supported for weights that are matrices, and for "
            f"{' and '.join(FUSED)} of experts, not for {layer.parameter_name}. Leave it out."
        )
    if Version(version("peft")) < Version("0.19"):
        raise ConfigError(f"{module}: PEFT before 0.19 swaps A and B of experts. Install PEFT 0.19 or newer.")
    for cutter, is_cut in (("FSDP2", lambda p: hasattr(p, "to_local")), ("DeepSpeed's ZeRO", piece_of)):
        if any(map(is_cut, layer.parameters(recurse=True))):
            raise ConfigError(
                f"{module}: LoRA of experts is not supported under {cutter}; train on one device or with DDP."
            )


def match_sites(names: Sequence[str], patterns: Iterable[str]) -> list[str]:
    """Return the names that match a shell-style pattern, in their given order; a ConfigError if one matches nothing."""
    chosen: set[str] = set()
    for pattern in patterns:
        hits = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        if not hits:
            near = _nearest(names, pattern)
            hint = f" Nearest: {', '.join(near)}." if near else ""
            raise ConfigError(f"sites: {pattern!r} matches none of {len(names)} sites.{hint}")
        chosen.update(hits)
    return [name for name in names if name in chosen]


def _nearest(names: Sequence[str], pattern: str) -> list[str]:
    """Suggest the pattern with its unknown parts replaced by similar parts of names, or else similar names."""
    parts = sorted({part for name in names for part in name.split(".")})
    mended = []
    for part in pattern.split("."):
        literal = part.strip("*")
        near = [] if fnmatch.filter(parts, part) else difflib.get_close_matches(literal, parts, n=1)
        mended.append(part.replace(literal, near[0]) if near else part)
    if fnmatch.filter(names, ".".join(mended)):
        return [".".join(mended)]
    return difflib.get_close_matches(pattern, names, n=3, cutoff=0.3)
