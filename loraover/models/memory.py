"""Memory that a model needs on a device, and the message if there is less."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from loraover.common.errors import ConfigError, LoraOverError, is_out_of_memory
from loraover.common.request import as_written
from loraover.models.device import found_devices, free_memory, total_memory
from loraover.models.load import ModelSource, load_config, load_skeleton

BYTES = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2}
ACTIVATIONS = 16  # numbers of a layer's activations for one token, in multiples of the hidden size
ROOM = 0.9  # share of a device's memory that a plan may fill: the rest goes to its driver and to fragments


@dataclass(frozen=True)
class Needs:
    """Numbers that a check holds at once.

    Args:
        weights: Weights of the base model, in the compute dtype.
        adapters: Numbers of the adapters beside it, in float32 or wider.
        tokens: Tokens that run at once.
        per_token: Numbers for each of them, in the compute dtype: logits and activations.
        at_least: Bytes of a number in the widest run, whatever the compute dtype is.
    """

    weights: int
    adapters: int
    tokens: int
    per_token: int
    at_least: int = 2

    @classmethod
    def of_model(
        cls, source: ModelSource, *, adapters: int, tokens: int, copies: int = 1, logits: int = 1, at_least: int = 2
    ) -> Needs:
        """Estimate the needs of runs of a model, from its configuration.

        Args:
            source: The model.
            adapters: Numbers of the adapters beside it.
            tokens: Tokens that run at once.
            copies: Copies of the model.
            logits: Copies of the tokens' logits that are held.
            at_least: Bytes of a number in the widest run, whatever the compute dtype is.
        """
        skeleton = load_skeleton(source)
        config = skeleton.config.get_text_config()
        weights = copies * sum(parameter.numel() for parameter in skeleton.parameters())
        per_token = logits * config.vocab_size + ACTIVATIONS * config.hidden_size
        return cls(weights, adapters, tokens, per_token, at_least)

    def width(self, dtype: str) -> int:
        """Bytes of a number in a compute dtype."""
        return max(self.at_least, BYTES[dtype])

    def size(self, dtype: str) -> int:
        """Bytes in a compute dtype."""
        width = self.width(dtype)
        return width * (self.weights + self.tokens * self.per_token) + max(4, width) * self.adapters


def fit_base(
    work: str,
    base: ModelSource,
    *,
    device: str,
    compute_dtype: str,
    needs: Needs,
    say: Callable[[str], None],
    max_memory_gib: float | None = None,
) -> ModelSource:
    """Say what work needs of a device's memory before it starts, and choose how to load the base model.

    Args:
        work: The work, as the beginning of a sentence.
        needs: What it needs.
        say: Receiver of the sentences.
        max_memory_gib: Largest size of the base model's weights in memory, in GiB; None: what the device has free.

    Returns:
        The base model, which is spread over all GPUs if its weights are larger and there is room on all of them
        together, and else streamed; a quantised one stays as it is.
    """
    free, weights = free_memory(device), needs.width(compute_dtype) * needs.weights
    has = "" if free is None else f"; {device} has {_gib(free)} free"
    say(f"{work} needs about {_gib(needs.size(compute_dtype))} of memory in {compute_dtype}{has}")
    rest = needs.size(compute_dtype) - weights
    room = None if free is None else ROOM * free - rest
    limit = room if max_memory_gib is None else max_memory_gib * 2**30
    is_quantised = getattr(load_config(base), "quantization_config", None) is not None
    if limit is None or weights <= limit or is_quantised:
        return base
    gpus = [free_memory(f"cuda:{index}") or 0 for index in range(found_devices()["cuda"])] if device == "cuda" else []
    if max_memory_gib is None and weights <= ROOM * sum(gpus) - len(gpus) * rest:
        say(f"the base model's weights, {_gib(weights)}, do not fit on one GPU: its layers are spread over {len(gpus)}")
        return replace(base, is_spread=True)
    say(
        f"the base model's weights, {_gib(weights)}, do not fit into {_gib(max(0, limit))}: they stay in their files, "
        "and each is read whenever it is used"
    )
    return replace(base, is_streamed=True)


@contextmanager
def memory_explained(
    work: str, *, device: str, compute_dtype: str, needs: Callable[[], Needs], option: str = "device"
) -> Iterator[None]:
    """Turn a failed allocation within the block into an error that says what would fit.

    Args:
        work: The work, as the beginning of a sentence.
        needs: Function that estimates what the work needs; it is called only after a failure.
        option: Name of the argument that chooses the device.

    Raises:
        ConfigError: Memory could not be allocated.
    """
    try:
        yield
    except (RuntimeError, MemoryError, ConfigError) as error:
        if not is_out_of_memory(error):
            raise
        cause = error.__cause__ if isinstance(error, LoraOverError) and error.__cause__ is not None else error
        found = (str(cause).splitlines() or [type(cause).__name__])[0][:200]
        needed, memory, fits = needs(), total_memory(device), []
        for kind, count in found_devices().items():
            room = total_memory(kind) if count else None
            for other in ("fp32", "bf16"):
                is_failed = (kind, other) == (device.partition(":")[0], compute_dtype)
                if room is not None and not is_failed and needed.size(other) <= ROOM * room:
                    plan = f"{as_written(option, kind)} {as_written('compute_dtype', other)}"
                    fits.append(f"{plan} ({_gib(needed.size(other))} of {_gib(room)})")
        width = needed.width(compute_dtype)
        has = "" if memory is None else f" {device} has {_gib(memory)}."
        raise ConfigError(
            f"{work} ran out of memory on {device} ({found}). It needs about {_gib(needed.size(compute_dtype))} in "
            f"{compute_dtype}: {_gib(width * needed.weights)} for the base model, and "
            f"{_gib(width * needed.tokens * needed.per_token)} for {needed.tokens} tokens at once, which shorter or "
            f"fewer prompts reduce.{has} "
            + (f"What would fit: {'; '.join(fits)}." if fits else "No other device or dtype here has room for it.")
        ) from error


def _gib(size: float) -> str:
    return f"{size / 2**30:.3g} GiB"
