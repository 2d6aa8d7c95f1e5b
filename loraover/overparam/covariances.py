"""Bases from calibration batches: eigenvectors of the covariance of a layer's inputs, and of its output's gradients.

K-FAC's eigenbases (George et al. 2018, arXiv:1806.03884) for the two factors of a LoRA. The columns of A live in the
space of the layer's inputs x, the rows of B in that of its outputs y = W x + s B A x. With C_in = sum x x^T and
C_out = sum d d^T over all tokens, where d = dL/dy, the sides of length r have the moments A C_in A^T (of B) and
B^T C_out B (of A). While B = 0, its gradient stands for it there, since that is where B will move.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from loraover.common.errors import ConfigError, is_out_of_memory
from loraover.overparam.block_bases import MAX_BLOCK, SIDES, Bases, Blocks, Side, eigenvectors
from loraover.overparam.core_group import full_precision
from loraover.overparam.decompositions import Decomposition
from loraover.overparam.probe import Probe
from loraover.overparam.sharding import full, of_first_process
from loraover.overparam.sites import Site, lora_layers


class _Moments:
    """C_in and C_out of one layer, block by block: (count, size, size), float32.

    Args:
        blocks: Division of the inputs by "A", of the outputs by "B"; a matrix that is not trained is absent.
    """

    def __init__(self, blocks: Mapping[str, Blocks]) -> None:
        self.blocks = blocks
        self.sums: dict[str, Tensor] = {}
        self._room: dict[str, Tensor] = {}

    def reserve(self, device: torch.device) -> None:
        """Take the memory of both moments now: between activations, it would leave gaps that these do not fit into."""
        for matrix, blocks in self.blocks.items():
            self._room[matrix] = torch.zeros(blocks.number, blocks.size, blocks.size, device=device)

    def mebibytes(self, block: int = MAX_BLOCK) -> float:
        """Memory of both moments, in MiB; with `block`, if no block were larger."""
        divided = [Blocks.of(blocks.length, min(blocks.size, block)) for blocks in self.blocks.values()]
        return sum(blocks.number * blocks.size**2 for blocks in divided) * 4 / 2**20

    def add(self, matrix: str, x: Tensor) -> None:
        """Add the tokens x, (tokens, length), if the matrix is trained: inputs for A, gradients of outputs for B."""
        if matrix not in self.blocks:
            return
        split = self.blocks[matrix].split(x).transpose(0, 1)
        with full_precision(x.device):  # the model may be running under autocast
            moment = split.mT @ split
        if matrix not in self.sums:
            self.sums[matrix] = self._room.pop(matrix, torch.zeros_like(moment)).to(moment.device)
        self.sums[matrix] += moment

    def along(self, matrix: str, directions: Tensor) -> Tensor | None:
        """W C W^T for directions W, (r, length); None where nothing was seen."""
        if matrix not in self.sums:
            return None
        split = self.blocks[matrix].split(directions.to(self.sums[matrix])).transpose(0, 1)  # (count, r, size)
        with full_precision(split.device):
            return (split @ self.sums[matrix] @ split.mT).sum(0)


class _Pass:
    """The forward or backward pass that is running, and the padding of its batch.

    A decoder reads its own tokens, and in its cross-attention those of the encoder, whose output it is given.
    """

    def __init__(self, model: nn.Module) -> None:
        from transformers import PreTrainedModel

        self.is_forward = True
        base = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
        has_encoder = base is not None and base.config.is_encoder_decoder
        self.encoder: nn.Module | None = base.get_encoder() if base is not None and has_encoder else None
        self._layers = set() if self.encoder is None else set(self.encoder.modules())
        self._encoded: Tensor | None = None
        self._masks: dict[str, Tensor | None] = {}

    def begin(self, batch: Any) -> None:
        """Start the forward pass of a batch."""
        self.is_forward = True
        for key in ("attention_mask", "decoder_attention_mask"):
            mask = batch.get(key) if hasattr(batch, "get") else None
            self._masks[key] = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None

    def encode(self, encoder: nn.Module, inputs: Any, output: Any) -> None:
        """Note what the encoder gives, as a hook of it."""
        self._encoded = output[0]

    def mask(self, layer: nn.Module, x: Tensor) -> Tensor | None:
        """The mask of the tokens x that a layer reads; None where all of them count."""
        is_encoded = self._encoded is not None and x.data_ptr() == self._encoded.data_ptr()
        is_source = self.encoder is None or layer in self._layers or is_encoded
        return self._masks["attention_mask" if is_source else "decoder_attention_mask"]


def _tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """(tokens, length), float32, without padding."""
    kept = x.detach()
    if mask is not None and kept.shape[:-1] == mask.shape:
        kept = kept[mask.to(kept.device).bool()]
    return kept.reshape(-1, kept.shape[-1]).float()


def measured_bases(
    probe: Probe, chosen: Sequence[Site], everything: Mapping[str, Site], decomposition: Decomposition
) -> dict[str, Bases]:
    """Bases of the chosen sites' sides that come from calibration, by name; the probe's gradients are cleared."""
    assert decomposition.bases is not None
    largest = decomposition.bases.rule.block
    if any(site.part is not None for site in chosen):
        raise ConfigError(
            "bases from calibration are measured on a layer's inputs, and a module of several experts is a single "
            "layer; leave out the sites of experts, or give eigen the options {short: gradient, long: gradient}, or "
            "none in place of gradient if the optimizer's state cannot be turned."
        )
    pairs: dict[tuple[str, str], dict[str, Site]] = {}
    for site in everything.values():
        pairs.setdefault((site.module, site.adapter), {})[site.matrix] = site

    def feature_blocks(site: Site) -> Blocks:  # of the side of a matrix that is not the rank
        side: Side = "columns" if site.matrix == "A" else "rows"
        m, n = site.shape
        bases = decomposition.of_site(site.name).bases
        assert bases is not None
        return bases.blocks(side, m, n) or Blocks.of(n if side == "columns" else m, largest)

    moments = {}
    for site in chosen:
        pair = pairs[site.module, site.adapter].items()
        moments[site.module] = _Moments({name: feature_blocks(one) for name, one in pair})
    layers = lora_layers(probe.model)
    try:
        for site in {site.module: site for site in chosen}.values():
            moments[site.module].reserve(site.parameter.device)
        with _observed(probe.model, {layers[module]: found for module, found in moments.items()}) as running:
            has_loss = [_run(probe, batch, running) for batch in probe.batches]
        with torch.no_grad():
            bases = _bases(chosen, pairs, moments, decomposition)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise _too_large(moments, max(1, largest // 2)) from error
    finally:
        probe.model.zero_grad()
    if not any(has_loss):
        raise ConfigError(
            "calibration: no batch has a finite loss, so there are no gradients to measure. A batch whose labels are "
            "all -100 has none; check the labels and the truncation of the training data."
        )
    sides = _measured_sides(chosen, decomposition)
    unseen = list(dict.fromkeys(site.name for site, side, _ in sides if side not in bases[site.name]))
    if unseen:
        raise ConfigError(
            f"calibration: the batches give no covariance of {len(unseen)} matrices, first {unseen[0]}: their layers "
            "were not run, ran without PyTorch's hooks, or had gradients of zero. Give more batches, leave these out "
            "with `sites`, or give eigen the options {short: gradient, long: gradient}, or none in place of gradient "
            "if the optimizer's state cannot be turned."
        )
    return bases


def _run(probe: Probe, batch: Any, running: _Pass) -> bool:
    """Run a batch forward and backward, and return whether its loss is finite; its graph is freed."""
    running.begin(batch)
    with torch.enable_grad():
        loss = probe.loss(probe.model, batch)
        running.is_forward = False
        torch.autograd.backward(loss)
    return bool(loss.isfinite().all())


def _too_large(moments: Mapping[str, _Moments], block: int) -> ConfigError:
    kept, smaller = (sum(found.mebibytes(at_most) for found in moments.values()) for at_most in (MAX_BLOCK, block))
    return ConfigError(
        "calibration ran out of memory: it needs a forward and a backward pass of one batch, as a training step does, "
        f"and {kept:.1f} MiB for the moments of {len(moments)} layers, or {smaller:.1f} MiB with block: {block}. Use "
        "smaller batches, gradient checkpointing, a smaller block, or long: gradient, which measures during training."
    )


def shared_columns(bases: Mapping[str, Bases]) -> dict[str, str]:
    """For each site that has a measured basis of columns, the first site with the very same one."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(found["columns"]), name) for name, found in bases.items() if "columns" in found}


@contextmanager
def _observed(model: nn.Module, layers: Mapping[Any, _Moments]) -> Iterator[_Pass]:
    """Hooks that add up moments; a forward that checkpointing repeats counts once, and nothing is compiled."""
    running, handles = _Pass(model), []

    def hook(found: _Moments) -> Callable[..., None]:
        def note(module: Any, inputs: tuple[Any, ...], output: Any) -> None:
            mask = running.mask(module, inputs[0])
            if running.is_forward and inputs[0].is_floating_point():
                found.add("A", _tokens(inputs[0], mask))
            if output.requires_grad:
                output.register_hook(lambda gradient: found.add("B", _tokens(gradient, mask)))

        return note

    try:
        for layer, found in layers.items():
            handles.append(layer.register_forward_hook(hook(found)))
        if running.encoder is not None:
            handles.append(running.encoder.register_forward_hook(running.encode))
        with torch.compiler.set_stance("force_eager"):
            yield running
    finally:
        for handle in handles:
            handle.remove()


def _bases(
    chosen: Sequence[Site],
    pairs: Mapping[tuple[str, str], Mapping[str, Site]],
    moments: Mapping[str, _Moments],
    decomposition: Decomposition,
) -> dict[str, Bases]:
    known: dict[bytes, Tensor] = {}
    found: dict[str, Bases] = {site.name: {} for site in chosen}
    left = Counter(site.module for site, _, _ in _measured_sides(chosen, decomposition))
    for site, side, blocks in _measured_sides(chosen, decomposition):
        moment = _moment(site, side, blocks, pairs[site.module, site.adapter], moments[site.module])
        left[site.module] -= 1
        if not left[site.module]:
            moments[site.module].sums.clear()  # which take as much memory as the bases
        if moment is None or not bool(moment.any()):
            continue
        if not bool(moment.isfinite().all()):
            raise ConfigError(
                f"calibration: the inputs or gradients of {site.module} are not finite on the calibration batches, "
                "so no basis can be measured; check the data and the base model."
            )
        moment = of_first_process(moment).cpu().double()
        key = hashlib.sha256(moment.numpy().tobytes()).digest() + repr(blocks).encode()
        if key not in known:
            basis = of_first_process(eigenvectors(moment, blocks), site.parameter.device)
            known[key] = basis.to(torch.promote_types(site.parameter.dtype, torch.float32))  # that of the cores
        found[site.name][side] = known[key]
    return found


def _measured_sides(chosen: Sequence[Site], decomposition: Decomposition) -> Iterator[tuple[Site, Side, Blocks]]:
    """Sides whose bases come from calibration; a basis that only an embedding's tokens could give is the identity."""
    for site, side in product(chosen, SIDES):
        bases = decomposition.of_site(site.name).bases
        assert bases is not None
        blocks = bases.blocks(side, *site.shape)
        is_of_tokens = side == "columns" and site.name.endswith(".lora_embedding_B")
        if blocks is not None and bases.source(side, *site.shape) == "calibration" and not is_of_tokens:
            yield site, side, blocks


def _moment(site: Site, side: Side, blocks: Blocks, pair: Mapping[str, Site], moments: _Moments) -> Tensor | None:
    """The second moment of a side, block by block; None where nothing was seen."""
    if side == ("columns" if site.matrix == "A" else "rows"):
        return moments.sums.get(site.matrix)
    partner = "B" if site.matrix == "A" else "A"
    if partner not in pair:
        raise ConfigError(
            f"{site.name}: the basis of its side of length r is measured through {partner} of the same module, which "
            "is frozen or belongs to another module; train both, or give eigen the option short: gradient, or short: "
            "none if the optimizer's state cannot be turned."
        )
    other = pair[partner]
    directions = full(other.values)
    if not bool(directions.any()):
        gradient = other.gradient()
        if gradient is None:
            return None
        directions = full(gradient)
    whole = moments.along(other.matrix, directions.mT if other.matrix == "B" else directions)
    return None if whole is None else blocks.diagonal(whole)
