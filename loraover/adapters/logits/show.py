"""The verdict of an export as text for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from loraover.adapters.logits.judge import POWER, Proof
from loraover.reporting.palette import terminal_color
from loraover.reporting.reporter import print_line

OTHER_TEXTS = "Try --prompts with texts that it was trained for, or --dtype fp32."


def show_verdict(proof: Proof, text: str, console: Console) -> None:
    """Print a text in the colour of a verdict."""
    print_line(console, text, terminal_color(proof.verdict))


def show_place(proof: Proof, output: Path, console: Console, *, reason: str = "") -> None:
    """Print where the output is, or the reason for which nothing was written."""
    text = f"wrote {output}" if proof.verdict != "failed" else f"nothing was written{reason and f': {reason}'}"
    print_line(console, text)


def show_left_out(keys: Sequence[str], console: Console) -> None:
    """Print the keys of tensors that an export left out, if there are any."""
    if keys:
        print_line(console, f"left out, as copies of the base model's weights: {', '.join(keys)}", "yellow")


def in_one_line(facts: Mapping[str, str]) -> str:
    """Join rows of a model card."""
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def undecided(subject: str, remedy: str, judged: str = "it") -> str:
    """Return why a comparison of logits is inconclusive, and what to try."""
    found = f"{subject} moves no logit by {POWER:g} times the allowed error"
    return f"{found}, so this check cannot distinguish {judged} from an adapter that does nothing. {remedy}"
