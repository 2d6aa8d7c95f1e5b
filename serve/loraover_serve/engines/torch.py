"""PyTorch in this process, one request after another: the base model, PEFT adapters, and the unfolded model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from loraover.checkpoint.checkpoint import read_checkpoint
from loraover.reference.unfolded_model import unfolded
from loraover_serve.engines.base import Engine, engine_errors
from loraover_serve.engines.sample import Request, Sample

Switch = Callable[[], AbstractContextManager[Any]]
"""Returns a context manager that yields the model to run."""
Within = Callable[[Any], AbstractContextManager[Any]]


class TorchEngine(Engine):
    """PyTorch with PEFT; arms share one copy of the base model where they can.

    Args:
        switches: functions that select each arm's model, by the arm's name.
    """

    name = "torch"

    def __init__(self, switches: Mapping[str, Switch]) -> None:
        self.arms = tuple(switches)
        self._switches = dict(switches)

    @torch.inference_mode()
    def logits(
        self, arm: str, sequences: Iterable[Sequence[int]], *, within: Within = nullcontext
    ) -> Iterator[NDArray[np.float32]]:
        """Yield an arm's logits after each token of each sequence, of shape (tokens, vocabulary).

        Args:
            arm: name of the arm.
            sequences: token ids.
            within: context manager that changes how the model computes; it is called with the model.
        """
        with engine_errors(self.name), self._switches[arm]() as model, within(model):
            for tokens in sequences:
                yield model_logits(model, tokens)

    @torch.inference_mode()
    def run(self, arm: str, block: int, first: int, requests: Sequence[Request]) -> list[Sample]:
        with engine_errors(self.name), self._switches[arm]() as model:
            return [_answer(model, arm, block, first + i, request) for i, request in enumerate(requests)]


def torch_engine(load_base: Callable[[], Any], adapters: Mapping[str, Path], checkpoint: Path | None) -> TorchEngine:
    """Load the base model, every adapter with PEFT, and the unfolded model of a checkpoint.

    Args:
        load_base: function that loads a plain transformers model in eval mode, to the device to run on. It is called
            twice if there is a checkpoint, because PEFT changes the model that it gets.
        adapters: folder of each arm's adapter.
        checkpoint: folder of a LoRA-Over checkpoint; None for no unfolded model.

    Raises:
        EngineError: an adapter that PEFT refuses.
    """
    from peft import PeftModel

    first, *others = adapters.items()
    with engine_errors(TorchEngine.name):
        plain = load_base()
        on = str(plain.device)
        model = PeftModel.from_pretrained(plain, str(first[1]), adapter_name=first[0], torch_device=on)
        for arm, path in others:
            model.load_adapter(str(path), adapter_name=arm, torch_device=on)
        model.eval()

    @contextmanager
    def base() -> Iterator[Any]:
        with model.disable_adapter():
            yield model

    def adapted(arm: str) -> Switch:
        @contextmanager
        def switch() -> Iterator[Any]:
            model.set_adapter(arm)
            yield model

        return switch

    switches: dict[str, Switch] = {"base": base} | {arm: adapted(arm) for arm in adapters}
    if checkpoint is not None:
        separate, source = load_base(), read_checkpoint(checkpoint)
        switches["unfolded"] = lambda: unfolded(separate, source, delta_dtype=torch.float32)  # as in training
    return TorchEngine(switches)


def model_logits(model: Any, tokens: Sequence[int]) -> NDArray[np.float32]:
    """Return a model's logits after each of the tokens, of shape (tokens, vocabulary)."""
    ids = torch.tensor([list(tokens)], device=model.device)
    logits: NDArray[np.float32] = model(input_ids=ids, use_cache=False).logits[0].float().cpu().numpy()
    return logits


def _answer(model: Any, arm: str, block: int, index: int, request: Request) -> Sample:
    ids = torch.tensor([request.prompt], device=model.device)
    cache: dict[str, Any] = {}
    chosen: list[int] = []
    times: list[float] = []
    logprobs: list[float] = []
    start = time.perf_counter()
    while len(chosen) < request.new_tokens:
        output = model(input_ids=ids, use_cache=True, logits_to_keep=1, **cache)
        cache = {"past_key_values": output.past_key_values}
        scores = output.logits[0, -1].float()
        chosen.append(int(scores.argmax()))
        times.append(time.perf_counter())
        logprobs.append(float(scores[chosen[-1]] - scores.logsumexp(-1)))
        ids = torch.tensor([[chosen[-1]]], device=model.device)
    return Sample(arm, block, index, start, tuple(times), tuple(chosen), tuple(logprobs))
