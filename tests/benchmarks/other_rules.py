"""Right adapters called wrong, and faults missed, by verify and by rules that others use, on recorded answers.

    cd tests && ../.venv/bin/python -m benchmarks.other_rules [--write]

The answers are those that `benchmarks.verify_noise` recorded: of each engine those on the weights that it serves, if
they were recorded, else those on float weights. Sets of 32 prompts are drawn as `support.recorded_noise` says. Three
faults were served: the base model, and the adapter at 0.8 and 1.2 times its strength. Two are computed, with the
engine's recorded noise: half of the adapter, and another adapter of the same size, whose change of each prompt is that
of the prompt before. --write puts the table into docs/verify.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
from numpy.typing import NDArray

from loraover.common.atomic_output import publish_text

from benchmarks.page import replaced
from support.recorded_noise import Floats, Recorded

PAGE, NAME = Path(__file__).parents[2] / "docs" / "verify.md", "other_rules"
PROMPTS, RUNS, BATCH = 32, 2000, 500
RIGHT = "right"
FAULTS = ("base", "0.5 times", "0.8 times", "1.2 times", "another")
TRIED = 2000
"""Number of thresholds that are tried to find a rule's best one."""

Scores = Mapping[str, Floats]
"""A rule's score of each drawn set of prompts, by the name of what the engine serves."""


class Rule(NamedTuple):
    """A rule that calls an engine wrong if a score of its answers exceeds a threshold.

    Args:
        words: The rule in words.
        threshold: The published threshold.
        source: Place where it is published, as Markdown.
        score: Function of an engine, the name of the arm that is served as the adapter, and drawn prompts of shape
            (sets, prompts); it returns a score for each set.
    """

    words: str
    threshold: float
    source: str
    score: Callable[[Recorded, str, NDArray[np.int64]], Floats]


def mean_absolute(engine: Recorded, arm: str, chosen: NDArray[np.int64]) -> Floats:
    """Mean of |delta logprob| in each set, in nats."""
    return _mean(np.abs(engine.off(arm)), chosen)


def half_mean_square(engine: Recorded, arm: str, chosen: NDArray[np.int64]) -> Floats:
    """Half the mean square of delta logprob in each set, in square nats: the KL divergence to second order."""
    return _mean(np.square(engine.off(arm)) / 2, chosen)


def times_base(engine: Recorded, arm: str, chosen: NDArray[np.int64]) -> Floats:
    """Mean of |delta logprob| in each set, divided by the base model's."""
    return mean_absolute(engine, arm, chosen) / _mean(np.abs(engine.base_off), chosen)


def other_texts(engine: Recorded, arm: str, chosen: NDArray[np.int64]) -> Floats:
    """Share of the prompts of each set whose greedy tokens are not all PyTorch's."""
    right = np.where(engine.likely == 0, -np.inf, engine.likely + engine.effect)
    parted = (right + engine.off(arm)).argmax(-1) != right.argmax(-1)
    return _mean(parted.any(-1)[:, None, None].astype(float), chosen)


def _mean(values: Floats, chosen: NDArray[np.int64]) -> Floats:
    """Mean over the prompts of each set.

    Args:
        values: Shape (prompts, positions, tokens).
    """
    found: Floats = values.mean((1, 2))[chosen].mean(-1)
    return found


GITHUB = "https://github.com"
RULES = (
    Rule("mean of abs(delta logprob)", 0.05, f"[SkyRL]({GITHUB}/NovaSky-AI/SkyRL/pull/2182)", mean_absolute),
    Rule(
        "KL, as half the mean square",
        5e-3,
        f"[SGLang]({GITHUB}/sgl-project/sglang/blob/main/test/registered/lora/"
        "test_lora_qwen3_30b_a3b_instruct_2507_logprob_diff.py)",
        half_mean_square,
    ),
    Rule(
        "distance over the base model's",
        2.0,
        f"[tinker-cookbook]({GITHUB}/thinking-machines-lab/tinker-cookbook/pull/928)",
        times_base,
    ),
    Rule("share of other greedy texts", 0.0, "equal texts", other_texts),
)
"""The rules of others that can be computed from logprobs."""


def served(engine: Recorded) -> Iterator[tuple[str, Recorded, str]]:
    """Yield what an engine serves as the adapter: its name, the recording, and the arm in it."""
    number = len(engine.effect)
    yield RIGHT, engine, "adapter"
    yield "base", engine, "again"
    yield "0.5 times", engine.partly(number, 0.5), "adapter"
    yield "0.8 times", engine, "weak"
    yield "1.2 times", engine, "strong"
    yield "another", engine.beside_another(), "adapter"


def scores_of(rule: Rule, engine: Recorded) -> Scores:
    """Scores of drawn sets of prompts; the same sets for everything that is served."""
    chosen = np.random.default_rng(0).integers(len(engine.effect), size=(RUNS, PROMPTS))
    return {name: rule.score(recorded, arm, chosen) for name, recorded, arm in served(engine)}


def found_by(scores: Sequence[Scores], threshold: float) -> dict[str, float]:
    """Share of sets above a threshold, a mean over engines, by the name of what is served."""
    return {name: float(np.mean([np.mean(each[name] > threshold) for each in scores])) for name in (RIGHT, *FAULTS)}


def best_threshold(scores: Sequence[Scores]) -> float:
    """The one threshold for all engines with the fewest mistakes: right sets called wrong and faults missed.

    Right sets weigh as much as all faults together.
    """
    every = np.concatenate([values for each in scores for values in each.values()])
    tried = np.unique(np.quantile(every, np.linspace(0, 1, TRIED)))

    def mistakes(threshold: float) -> float:
        found = found_by(scores, threshold)
        return found[RIGHT] + float(np.mean([1 - found[fault] for fault in FAULTS]))

    return float(min(tried, key=mistakes))


def verdicts(engines: Sequence[Recorded]) -> tuple[dict[str, float], dict[str, float]]:
    """Shares of sets that verify says differ, and that it does not say are as trained, as `found_by` gives them."""
    differs = dict.fromkeys((RIGHT, *FAULTS), 0.0)
    not_passed = dict(differs)
    for engine in engines:
        for name, recorded, arm in served(engine):
            draw = np.random.default_rng(0)
            found = [recorded.judged(arm, draw, BATCH, PROMPTS) for _ in range(RUNS // BATCH)]
            wrong = np.concatenate([each.differs for each in found])
            narrow = np.concatenate([each.narrow for each in found])
            differs[name] += float(np.mean(wrong)) / len(engines)
            not_passed[name] += float(np.mean(wrong | ~narrow)) / len(engines)
    return differs, not_passed


def line(words: str, source: str, threshold: str, found: Mapping[str, float]) -> str:
    """Row of the table: right sets called wrong, and faults missed."""
    shares = [found[RIGHT], *(1 - found[fault] for fault in FAULTS)]
    return f"| {' | '.join([words, source, threshold, *(f'{abs(each):.1%}' for each in shares)])} |"


def table(engines: Sequence[Recorded]) -> list[str]:
    """Lines of the table."""
    heads = ["rule", "source", "limit", "right called wrong", *(f"{fault}: missed" for fault in FAULTS)]
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    differs, not_passed = verdicts(engines)
    lines.append(line("`verify`: *differs*", "this page", "as above", differs))
    lines.append(line("`verify`: not *as trained*", "this page", "as above", not_passed))
    for rule in RULES:
        scores = [scores_of(rule, engine) for engine in engines]
        best = best_threshold(scores)
        lines.append(line(rule.words, rule.source, f"{rule.threshold:g}", found_by(scores, rule.threshold)))
        lines.append(line(rule.words, "its best", f"{best:.3g}", found_by(scores, best)))
    return lines


def engines() -> list[Recorded]:
    """Each recorded engine, on the weights that it serves if these were recorded."""
    known = {each.name: each for each in (*Recorded.all(), *on_served_weights())}
    return [known[name] for name in sorted(known)]


def on_served_weights() -> list[Recorded]:
    """Engines on the weights that they serve, without PyTorch, which would be compared with itself there."""
    return [each for each in Recorded.on_served_weights() if not each.name.startswith("torch-")]


@click.command()
@click.option("--write", is_flag=True, help="Write the table into docs/verify.md.")
def main(write: bool) -> None:
    """Print the table, and write it if asked to."""
    recorded = engines()
    on_served = {each.name for each in on_served_weights()}
    names = ", ".join(each.name + (" (served weights)" if each.name in on_served else "") for each in recorded)
    caption = (
        f"Means over engines of {RUNS:,} sets of {PROMPTS} prompts each, with the number format declared: {names}. "
        "The base model, 0.8 and 1.2 times were served. Half of the adapter, and another one of the same size, are "
        "computed with the recorded noise. Each other rule has its published limit, and then the one limit that makes "
        "the fewest mistakes on all engines. tinker-cookbook also compares a server's answers with one another, which "
        "is left out."
    )
    text = "\n".join(["", *table(recorded), "", caption, ""])
    click.echo(text)
    if write:
        publish_text(PAGE, replaced(PAGE.read_text(encoding="utf-8"), NAME, text, PAGE))


if __name__ == "__main__":
    main()
