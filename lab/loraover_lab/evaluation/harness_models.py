"""Models as lm-evaluation-harness takes them: in memory, or behind an endpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.huggingface import HFLM
from transformers import LogitsProcessorList

from loraover.client.at_once import at_once
from loraover.client.endpoint import Endpoint
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


PATH = "/v1/completions"


class HarnessClient(TemplateLM):
    """Model that is asked through our client, in token ids, which no server can cut or complete."""

    def __init__(self, endpoint: Endpoint, name: str, tokenizer: Any, batch_size: int) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self._endpoint, self._name, self._batch_size = endpoint, name, batch_size

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path)

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        ends = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        return str(self.tokenizer.apply_chat_template(chat_history, tokenize=False, **ends))

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **named: Any) -> list[int]:
        found: list[int] = self.tokenizer(string, add_special_tokens=bool(add_special_tokens)).input_ids
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        def ask(request: Any) -> str:
            prompt, options = request.args
            stop = [*dict.fromkeys([*options["until"], self.tokenizer.eos_token])]
            body = self._body(self.tok_encode(prompt), max_tokens=options["max_gen_toks"], stop=stop)
            return str(self._endpoint.exchange(PATH, body, text=("text",))[0])

        return at_once(ask, requests, self._batch_size)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError  # no task of ours needs it

    def _loglikelihood_tokens(self, requests: Sequence[Any], **named: Any) -> list[tuple[float, bool]]:
        def ask(request: tuple[Any, list[int], list[int]]) -> tuple[float, bool]:
            _, context, continuation = request
            body = self._body(context + continuation, max_tokens=1, logprobs=1, echo=True)
            answer = self._endpoint.request(PATH, body)
            with self._endpoint.readable(self._name, answer, is_named=False):
                found = answer["choices"][0]["logprobs"]
                ours = slice(len(context), -1)  # the last one was generated, since some servers refuse to generate none
                told, likeliest = found["token_logprobs"][ours], found["top_logprobs"][ours]
                pairs = list(zip(told, likeliest, continuation, strict=True))
                return sum(told), all(one == max(best.values()) for one, best, _ in pairs)

        return at_once(ask, requests, self._batch_size)

    def _body(self, tokens: list[int], **more: Any) -> dict[str, Any]:
        return {"model": self._name, "prompt": [tokens], **self._endpoint.GREEDY, **more}
