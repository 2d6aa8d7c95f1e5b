"""How far a served model is from the same model in PyTorch, on the tokens that the server generated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from loraover_serve.vllm.client import Completion

PROMPTS = (
    "The train leaves at nine and arrives at noon, so the journey takes",
    "A farmer has 17 sheep and buys 25 more. How many sheep are there now?",
    "def is_even(number):\n",
    "Water boils at a lower temperature on a mountain because",
    "Dear all,\nplease find the minutes of",
    "Question: which planet is closest to the sun?\nAnswer:",
    "Der Zug fährt um neun Uhr ab.",
    "1, 1, 2, 3, 5, 8, 13,",
    "The capital of France is",
    "Once upon a time there was a",
    "The best way to learn a language is",
    "In 1969 the first human",
    "My favourite recipe starts with",
    "She opened the door and saw",
    "The three branches of government are",
    "To sort a list in Python,",
    "The heart pumps blood",
    "Photosynthesis is the process",
    "Dogs and cats differ in",
    "If it rains tomorrow, we",
)
NEW_TOKENS = 32


@dataclass(frozen=True)
class Agreement:
    """Differences between two engines over all generated tokens.

    Args:
        differences: (tokens,) logprob of each generated token, served minus PyTorch's, in nats.
        gaps: Logit of PyTorch's best token minus that of the served one, where the two texts first differ, one number
            for each continuation that PyTorch would not have chosen.
        continuations: Number of continuations.
    """

    differences: Tensor
    gaps: Sequence[float]
    continuations: int

    @property
    def rms(self) -> float:
        return float(self.differences.square().mean().sqrt())

    @property
    def largest(self) -> float:
        return float(self.differences.abs().max())

    def standard_error(self, tokens: int) -> float:
        """Standard error of an `rms` that is estimated from so many tokens.

        The standard error of the mean square is the squares' standard deviation / sqrt(tokens); the root divides it by
        2 rms.
        """
        return float(self.differences.square().std()) / sqrt(tokens) / (2 * self.rms)

    def __str__(self) -> str:
        return (
            f"rms {self.rms:.4f}, largest {self.largest:.3f} nats over {len(self.differences)} tokens; "
            f"{self.continuations - len(self.gaps)} of {self.continuations} continuations equal, "
            f"largest gap of the others {max(self.gaps, default=0.0):.3f}"
        )


@torch.no_grad()
def agreement(model: Any, prompts: Sequence[Sequence[int]], served: Sequence[Completion]) -> Agreement:
    """Run the model on each prompt with its served continuation, and compare at every generated token.

    By induction the model's own greedy text equals the served one where its best token is the served one at every
    position.
    """
    differences, gaps = [], []
    for prompt, completion in zip(prompts, served, strict=True):
        generated = torch.tensor(completion.token_ids)
        logits = model(torch.tensor([[*prompt, *completion.token_ids]])).logits[0, len(prompt) - 1 : -1].double()
        chosen = logits.gather(1, generated[:, None])[:, 0]
        differences.append(torch.tensor(completion.logprobs) - (chosen - logits.logsumexp(-1)))
        parted = (logits.argmax(-1) != generated).nonzero()[:, 0].tolist()
        if parted:
            gaps.append(float((logits.amax(-1) - chosen)[parted[0]]))
    return Agreement(torch.cat(differences), gaps, len(served))
