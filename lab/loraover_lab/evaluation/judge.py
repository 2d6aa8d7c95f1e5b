"""Ratings of open answers by another model, the judge, with FastChat's prompts.

Source: Zheng et al. 2023, arXiv:2306.05685, and the files of lm-sys/FastChat, fastchat/llm_judge/data.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from loraover.client.endpoint import Endpoint, UnansweredError, UnfitRequestError

TRIES = 3
RETRY_TEMPERATURE = 0.7  # at temperature 0 a judge would repeat itself
MAX_TOKENS = 2048
_RATING = re.compile(r"\[\[(\d+(?:\.\d+)?)\]\]")
# FastChat's second choice is any "[7]", even in code that the judge quotes
_LOOSE_RATING = re.compile(r"rating\W*\[(\d+(?:\.\d+)?)\]", re.IGNORECASE)


@dataclass(frozen=True)
class Rating:
    """A judge's reply.

    Args:
        rating: Rating from 1 to 10; None: the reply has none.
        text: The reply, or why there is none.
    """

    rating: float | None
    text: str


@dataclass(frozen=True)
class Judge:
    """A model that rates answers.

    Args:
        endpoint: The server.
        name: The model's name there.
    """

    endpoint: Endpoint
    name: str

    def rate(self, system_prompt: str, prompt: str) -> Rating:
        """Ask until there is a rating, `TRIES` times at most.

        Args:
            system_prompt: FastChat's system prompt.
            prompt: FastChat's prompt with question and answer.

        Raises:
            EngineError: The server refuses every request, for example because of a wrong key.
        """
        messages = [{"role": "system", "content": system_prompt}, {"role": "user", "content": prompt}]
        reply = ""
        for attempt in range(TRIES):
            temperature = RETRY_TEMPERATURE if attempt else 0.0
            try:
                reply = self.endpoint.chat(self.name, messages, max_tokens=MAX_TOKENS, temperature=temperature)
            except (UnansweredError, UnfitRequestError) as error:
                return Rating(None, str(error))  # the endpoint has repeated the request where that may help
            rating = find_rating(reply)
            if rating is not None:
                return Rating(rating, reply)
        return Rating(None, reply)


def find_rating(text: str) -> float | None:
    """Read the first "[[7]]", or else the first "Rating: [7]"; None if there is none from 1 to 10."""
    found = _RATING.search(text) or _LOOSE_RATING.search(text)
    if found is None or not 1 <= float(found[1]) <= 10:
        return None
    return float(found[1])
