"""A model behind an endpoint, as lm-evaluation-harness takes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import TemplateLM

from loraover.client.at_once import at_once
from loraover.client.endpoint import Endpoint

PATH = "/v1/completions"


class HarnessClient(TemplateLM):
    """Model that is asked through our client, in token ids, which no server can cut or complete.

    Args:
        endpoint: The server.
        name: The model's name there.
        tokenizer: Tokenizer of the base model.
        batch_size: Requests at the same time.
    """

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
