"""Where the trainers of TRL keep what an engine has sampled, by the private names of TRL 1.16."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from typing import Any, ClassVar, Final

import numpy as np

from loraover.common.errors import ConfigError
from loraover_serve.rollouts.policy import Row

TRL = "1.16"
"""Version of TRL whose private names these are."""

KEPT_SAMPLES = 4096
"""Number of samples of AsyncGRPO that may wait for their step."""


class RolloutSource(ABC):
    """Answers that an engine has sampled for a trainer.

    Args:
        trainer: The trainer. Some of its functions are wrapped, so that their answers can be kept.
    """

    needs: ClassVar[Sequence[str]]
    """Attributes of the trainer that are read, such as `vllm_generation.llm`"""
    server: ClassVar[str]
    """Name of the client of a vLLM server"""
    local: ClassVar[str]
    """Name of a vLLM in this process"""
    trains_on_logprobs: ClassVar = True
    """Whether the trainer uses the engine's logprobs, so that they must include the temperature"""
    attention: ClassVar[str | None] = None
    """Implementation of attention to run rows with; None means the trainer's"""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.rows: list[Row] = []

    @abstractmethod
    def new_rows(self) -> list[Row]:
        """Rows that were sampled for the present step; none if the step uses older rows again."""

    @property
    def version(self) -> int | None:
        """Number of the adapter that the engine has; None if the trainer does not count them."""
        return None

    @property
    def merges(self) -> bool:
        """Whether the adapter is merged into the weights that the engine gets."""
        return True

    @property
    def sink(self) -> dict[str, list[Any]]:
        """Metrics of the next line of the log, as lists of values."""
        found: dict[str, list[Any]] = self.trainer._metrics["train"]
        return found

    def engine_settings(self) -> tuple[str, str]:
        """Number format of the engine and the mode of its logprobs, as the engine reports them."""
        if getattr(self.trainer.args, "vllm_mode", "server") == "server":  # AsyncGRPO has no other
            told = read(self.trainer, self.server).get_server_info()["model_config"]
            return str(told["dtype"]), str(told["logprobs_mode"])
        config = read(self.trainer, self.local).llm_engine.model_config
        return str(config.dtype), str(config.logprobs_mode)


def read(trainer: Any, path: str) -> Any:
    """Return a part of a trainer by its names, such as vllm_generation.llm."""
    for name in filter(None, path.split(".")):
        trainer = getattr(trainer, name)
    return trainer


class Buffered(RolloutSource):
    """GRPO: the rows wait for their steps in a buffer, with the engine's logprobs."""

    needs = ("_buffered_inputs", "_metrics", "temperature", "vllm_generation")
    server, local = "vllm_generation.vllm_client", "vllm_generation.llm"

    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer)
        self._seen: Any = None

    def new_rows(self) -> list[Row]:
        """The rows of all micro-batches; they are returned once after each sampling."""
        buffered = self.trainer._buffered_inputs
        if buffered is self._seen:
            return []
        self._seen = buffered
        return [row for batch in buffered for row in self._rows(batch)]

    @staticmethod
    def _rows(batch: dict[str, Any]) -> Iterator[Row]:
        if "sampling_per_token_logps" not in batch:
            raise ConfigError("VerifyRollouts: the batch has no sampling_per_token_logps, the engine's logprobs.")
        if "pixel_values" in batch:
            raise ConfigError(
                "VerifyRollouts: the prompts have images, which it does not support; leave VerifyRollouts out."
            )
        told = {name: batch[name].tolist() for name in ("prompt_ids", "prompt_mask", "completion_ids")}
        scored = batch["completion_mask"] * batch.get("tool_mask", 1)
        engine = batch["sampling_per_token_logps"].tolist()
        own = batch["old_per_token_logps"].tolist() if "old_per_token_logps" in batch else None
        for index, (answer, sampled) in enumerate(zip(batch["completion_mask"].tolist(), scored.tolist(), strict=True)):
            prompt = [
                i for i, keeps in zip(told["prompt_ids"][index], told["prompt_mask"][index], strict=True) if keeps
            ]
            at = [place for place, keeps in enumerate(sampled) if keeps]
            yield Row(
                (*prompt, *told["completion_ids"][index][: sum(answer)]),
                tuple(len(prompt) + place for place in at),
                tuple(engine[index][place] for place in at),
                None if own is None else tuple(own[index][place] for place in at),
            )


def answered(prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], logprobs: Any) -> Iterator[Row]:
    """Rows of vLLM's answers. Each token has a list of logprobs, which begins with the token's own."""
    for prompt, answer, told in zip(prompts, answers, logprobs, strict=True):
        places = tuple(range(len(prompt), len(prompt) + len(answer)))
        yield Row((*prompt, *answer), places, tuple(float("nan") if v[0] is None else float(v[0]) for v in told))


class GeneratedRollouts(RolloutSource):
    """RLOO: the trainer drops the engine's logprobs, so they are copied when they arrive."""

    needs = ("_metrics", "temperature", "vllm_generation.generate", "vllm_generation.logprobs")
    server, local = "vllm_generation.vllm_client", "vllm_generation.llm"
    trains_on_logprobs = False

    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer)
        engine = trainer.vllm_generation
        engine.logprobs = 0  # those of the sampled tokens, for which RLOO does not ask
        generate = engine.generate

        def kept(*args: Any, **options: Any) -> Any:
            found = generate(*args, **options)
            if trainer.model.training:
                self.rows += answered(*found[:3])
            return found

        engine.generate = kept

    def new_rows(self) -> list[Row]:
        """The rows that were generated since the last step."""
        found, self.rows = self.rows, []
        return found


class Pairs(GeneratedRollouts):
    """Online DPO with a vLLM server: the trainer drops the engine's logprobs, too."""

    needs = ("stats", "temperature", "vllm_mode", "vllm_client.generate")
    server, local = "vllm_client", "llm"

    def __init__(self, trainer: Any) -> None:
        RolloutSource.__init__(self, trainer)
        if trainer.vllm_mode != "server":
            raise ConfigError(
                f"VerifyRollouts: OnlineDPOTrainer asks for no logprobs with vllm_mode {trainer.vllm_mode!r}; use "
                "vllm_mode 'server'."
            )
        generate = trainer.vllm_client.generate

        def kept(*args: Any, **options: Any) -> Any:
            found = generate(*args, **options)
            prompts = [ids for ids in found["prompt_ids"] for _ in range(options["n"])]
            self.rows += answered(prompts, found["completion_ids"], found["logprobs"])
            return found

        trainer.vllm_client.generate = kept

    @property
    def sink(self) -> dict[str, list[Any]]:
        """Metrics of the next line of the log, as lists of values."""
        found: dict[str, list[Any]] = self.trainer.stats
        return found


class Queued(RolloutSource):
    """AsyncGRPO: samples come from a queue, with the number of the adapter; the loss gets them packed.

    Each sample must come from the adapter whose number it has, and this adapter may be at most `max_staleness` versions
    older than the present one.

    Args:
        trainer: The trainer.
        max_staleness: Number of versions by which a sample's adapter may be older; None takes the trainer's setting.
    """

    needs = ("_metrics", "_lora_sync", "args.max_staleness", "compute_loss", "model_version", "rollout_queue")
    server, local = "vllm_client", ""
    attention = "sdpa"  # the trainer's takes packed rows alone

    def __init__(self, trainer: Any, max_staleness: int | None = None) -> None:
        super().__init__(trainer)
        self._samples: dict[bytes, Any] = {}
        self._max_staleness = trainer.args.max_staleness if max_staleness is None else max_staleness
        compute = trainer.compute_loss
        if trainer.rollout_queue is not None:
            trainer.rollout_queue = _Recorded(trainer.rollout_queue, self._keep)

        def seen(model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
            if model.training:
                self.rows += self._rows(inputs)
            return compute(model, inputs, *args, **options)

        trainer.compute_loss = seen

    @property
    def merges(self) -> bool:
        """Whether the server was started without a LoRA, so that merged weights are sent to it."""
        return not self.trainer._lora_sync

    @property
    def version(self) -> int | None:
        """Number of the adapter that the engine has."""
        found: int = self.trainer.model_version
        return found

    def _keep(self, sample: Any) -> None:
        self._samples[_key(sample.old_log_probs[1:][np.asarray(sample.completion_mask[1:], bool)])] = sample
        while len(self._samples) > KEPT_SAMPLES:
            del self._samples[next(iter(self._samples))]

    def _rows(self, inputs: Any) -> Iterator[Row]:
        """The samples whose logprobs a micro-batch has, one after the other."""
        chosen = inputs["token_index"] >= 0
        told, segment = (inputs[name][chosen].cpu().numpy() for name in ("old_log_probs", "segment_id"))
        oldest = self.trainer.model_version - self._max_staleness
        for index in range(int(segment.max()) + 1 if len(segment) else 0):
            sample = self._samples.pop(_key(told[segment == index]), None)
            if sample is not None:
                places = tuple(place for place in range(1, len(sample.input_ids)) if sample.completion_mask[place])
                engine = tuple(float(sample.old_log_probs[place]) for place in places)
                ids = tuple(int(i) for i in sample.input_ids)
                yield Row(ids, places, engine, version=max(sample.model_version, oldest))

    def new_rows(self) -> list[Row]:
        """The rows that the losses of the present step have seen."""
        found, self.rows = self.rows, []
        return found


def _key(logprobs: Any) -> bytes:
    return np.asarray(logprobs, np.float32).tobytes()


class _Recorded:
    """A queue that hands each of its samples to a function as well."""

    def __init__(self, queue: Any, show: Callable[[Any], None]) -> None:
        self._queue, self._show = queue, show

    def get(self, *args: Any, **options: Any) -> Any:
        sample = self._queue.get(*args, **options)
        self._show(sample)
        return sample

    def __getattr__(self, name: str) -> Any:
        return getattr(self._queue, name)


SOURCES: Final[dict[str, type[RolloutSource]]] = {
    "AsyncGRPOTrainer": Queued,
    "GRPOTrainer": Buffered,
    "RLOOTrainer": GeneratedRollouts,
    "OnlineDPOTrainer": Pairs,
}
"""Sources by the name of TRL's trainer; they also serve trainers that are derived from it."""


def source_of(trainer: Any, max_staleness: int | None = None) -> RolloutSource:
    """Return the source of a trainer.

    Args:
        trainer: The trainer.
        max_staleness: Number of versions by which a sample's adapter may be older, for AsyncGRPOTrainer; None takes the
            trainer's setting.

    Raises:
        ConfigError: Another trainer, one without an engine, a TRL that lacks a private name, or a staleness for a
            trainer that has none.
    """
    names = [kind.__name__ for kind in type(trainer).__mro__]
    kind = next((SOURCES[name] for name in names if name in SOURCES), None)
    if kind is None:
        raise ConfigError(f"VerifyRollouts knows the trainers {', '.join(SOURCES)} of TRL, and not {names[0]}.")
    if kind is not Queued and not trainer.args.use_vllm:
        raise ConfigError(
            f"VerifyRollouts: {names[0]} samples by itself, so no engine could have another policy; set "
            "use_vllm, or leave VerifyRollouts out."
        )
    if missing := [name for name in kind.needs if not _has(trainer, name)]:
        raise ConfigError(
            f"VerifyRollouts reads private names of TRL {TRL}, and {names[0]} of TRL {version('trl')} lacks "
            f"{', '.join(missing)}; install trl=={TRL}.*, or pass the arrays to RolloutJudge."
        )
    if kind is Queued:
        return Queued(trainer, max_staleness)
    if max_staleness is not None:
        raise ConfigError(f"VerifyRollouts: max_staleness is for AsyncGRPOTrainer, and not for {names[0]}.")
    return kind(trainer)


def _has(trainer: Any, path: str) -> bool:
    try:
        read(trainer, path)
    except AttributeError:
        return False
    return True
