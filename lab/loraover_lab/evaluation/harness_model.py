"""The harness's model in memory, which refuses questions that the harness would cut silently."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.models.huggingface import HFLM
from transformers import LogitsProcessorList

from loraover.common.errors import DataError
from loraover.training.run.answers import FiniteScores, greedy_settings


class HarnessModel(HFLM):
    """Model that answers complete questions only.

    Raises:
        DataError: A question and its answer exceed the model's context; nothing has been asked yet.
        EngineError: The model's scores of the next token are not finite.
    """

    def generate_until(self, requests: Sequence[Any], **named: Any) -> Any:
        is_apart = self.backend == "seq2seq"  # the decoder's answer takes no room in the encoder
        for request in requests:
            prompt, options = request.args
            self._check_room(request, len(self.tok_encode(prompt)) + (0 if is_apart else options["max_gen_toks"]))
        return super().generate_until(requests, **named)

    def loglikelihood(self, requests: Sequence[Any], **named: Any) -> Any:
        for request in requests:
            self._check_room(request, len(self.tok_encode("".join(request.args))) - 1)  # the last one is not read
        return super().loglikelihood(requests, **named)

    def _model_generate(self, *arguments: Any, **named: Any) -> Any:
        with greedy_settings(self.model):
            return super()._model_generate(*arguments, logits_processor=LogitsProcessorList([FiniteScores()]), **named)

    def _check_room(self, request: Any, tokens: int) -> None:
        if tokens > self.max_length:
            raise DataError(
                f"question {request.doc_id + 1}: it needs {tokens} tokens with its answer, but the model's context has "
                f"{self.max_length}; leave it out of the data, ask for fewer new tokens, or take a model with a longer "
                "context."
            )
