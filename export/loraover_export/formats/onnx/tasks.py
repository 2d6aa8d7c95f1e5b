"""The tasks and models that ONNX graphs are made for."""

from __future__ import annotations

from loraover.checkpoint.model_facts import read_facts
from loraover.common.errors import ConfigError, ExportError
from loraover.models.load import ModelSource
from loraover.models.model_file import MODULES_FILE, embeds_texts

TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS")
"""Tasks by PEFT's names."""

SEQ2SEQ_MODELS = ("t5", "mt5", "umt5")
"""Types of the encoder-decoder models whose layers `Seq2Seq` knows, by transformers' names."""


def find_task(named: str | None, base: ModelSource) -> str:
    """Return the task of a graph, one of `TASKS`.

    Args:
        named: PEFT's name of the task; None if the adapters name none, and the base model decides.
        base: The base model.

    Raises:
        ConfigError: A task that no graph is made for, such as the embedding of texts, or no usable configuration.
        ExportError: An encoder-decoder model that is no T5.
    """
    if named is None and embeds_texts(base):
        raise ConfigError(
            f"{base.origin} embeds texts, as its {MODULES_FILE} says, and no graph is made for that; if the adapter "
            'was trained to generate, set task_type in adapter_config.json to "CAUSAL_LM".'
        )
    facts = read_facts(base)
    task = named or ("SEQ_2_SEQ_LM" if facts.is_encoder_decoder else "CAUSAL_LM")
    if task not in TASKS:
        raise ConfigError(f"task_type is {task!r}, expected one of {', '.join(TASKS)}.")
    if task == "SEQ_2_SEQ_LM" and facts.model_type not in SEQ2SEQ_MODELS:
        raise ExportError(
            f"{base.origin}: model_type is {facts.model_type!r}; of encoder-decoder models, only "
            f"{', '.join(SEQ2SEQ_MODELS)} can be exported to ONNX."
        )
    return task
