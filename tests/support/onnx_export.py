"""`loraover export onnx` on small models: bases with a tokenizer, adapters, and a builder that starts at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
from torch import Tensor

from loraover.common.command_line import run
from loraover_export.cli import cli
from loraover_export.formats.onnx.kinds import decoder
from loraover_export.formats.onnx.report import OnnxReport

from support.builder_forks import ForkedBuilder, server_address
from support.children import Child
from support.compatibility import record
from support.make_checkpoint import Made, lora_model, make_checkpoint, save_tokenizer
from support.onnx_graph import FEEDS, Graph, genai_tokens, torch_tokens, worst_error
from support.plain_adapter import tiny_decoder

VOCABULARY = 80
"""Not the width of any layer: onnxruntime-genai's builder takes a layer with as many rows as tokens for the head."""

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
UNEVEN: dict[str, Any] = {
    "target_modules": LINEAR,
    "r": 4,
    "lora_alpha": 12,
    "rank_pattern": {"k_proj": 1, "layers.1.mlp.down_proj": 8},
    "alpha_pattern": {"q_proj": 5},
}
"""LoRA on every linear layer, with three ranks and several scalings."""

OTHER: dict[str, Any] = {
    "target_modules": ["q_proj", "down_proj"],
    "r": 9,
    "lora_alpha": 6,
    "rank_pattern": {},
    "alpha_pattern": {},
    "use_rslora": True,
}
"""Other targets, rank and scaling."""

LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
"""A model with a head size, 32, that both the builder and vLLM take."""

Sources = Path | Sequence[Path]


def tiny_base(folder: Path, family: str, **changes: Any) -> Path:
    """A decoder of the family with a tokenizer in `folder`; returns it."""
    tiny_decoder(family, **{"vocab_size": VOCABULARY, **changes}).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def tiny_lora(base: Path, folder: Path, **lora: Any) -> Any:
    """A plain PEFT adapter in `folder`, with B not zero; returns the PEFT model in eval mode."""
    model = lora_model(base, **(UNEVEN | lora)).eval()
    model.save_pretrained(folder)
    return model


def llama_checkpoint(folder: Path, *, base_options: Mapping[str, Any] | None = None, **lora: Any) -> Made:
    """A LoRA-Over checkpoint of a Llama that the builder takes."""
    options = LLAMA | dict(base_options or {})
    return make_checkpoint(folder, tokenizer=True, base_options=options, **(UNEVEN | lora))


def export(sources: Sources, output: Path, *options: str, quick: bool = True) -> int:
    """Run the command and return its exit code.

    Args:
        quick: The builder runs in a fork, which spares it 6 s of imports; else as the product starts it.
    """
    paths = [sources] if isinstance(sources, Path) else sources
    arguments = ["onnx", *map(str, paths), "-o", str(output), *options]
    with pytest.MonkeyPatch.context() as patch:
        if quick:
            patch.setattr(decoder, "BuilderProcess", ForkedBuilder)
        return run(cli, arguments)


def exported(family: str, sources: Sources, output: Path, *options: str, quick: bool = True) -> OnnxReport:
    """Run an export that must pass, return its report, and add a row to the compatibility table either way."""
    code = export(sources, output, *options, quick=quick)
    return _recorded(family, output, options, code)


def exported_at_once(
    family: str, requests: Mapping[Path, tuple[Sources, Sequence[str]]], *, quick: bool = True
) -> list[OnnxReport]:
    """Run several exports at once, each in its own process: torch's exporter uses one core."""
    if quick:
        server_address()  # one server for all of them
    children = {
        output: Child(partial(export, sources, output, *options, quick=quick))
        for output, (sources, options) in requests.items()
    }
    ended = {output: child.end() for output, child in children.items()}
    for end in ended.values():
        print(end.output)
    return [_recorded(family, output, requests[output][1], end.code) for output, end in ended.items()]


def _recorded(family: str, output: Path, options: Sequence[str], code: int) -> OnnxReport:
    mode = options[options.index("--mode") + 1]
    precision = options[options.index("--precision") + 1] if "--precision" in options else "fp32"
    if "--no-cache" in options:
        mode += ", no cache"
    if code != 0:
        record(family, "ONNX Runtime", mode, precision, "failed", None, None)
    assert code == 0
    report = read_report(output)
    assert report.verdict == "passed"
    worst = max(report.checks, key=lambda check: check.error / check.bound)
    record(family, "ONNX Runtime", mode, precision, report.verdict, worst.error, worst.bound)
    return report


Adapter = Literal["first", "second"] | None
"""None: the base model."""
ADAPTERS: tuple[Adapter, ...] = ("first", "second", None)


@dataclass(frozen=True)
class Exports:
    """Both modes of one model's adapter `first`, beside `second` in the swappable one, and PEFT's models of both."""

    folder: Path
    models: dict[str, Any]

    @property
    def merged(self) -> Graph:
        return Graph(self.folder / "merged" / "model.onnx")

    def swappable(self, name: Adapter) -> Graph:
        return Graph(self.folder / "swappable" / "model.onnx", self.adapter(name))

    def adapter(self, name: Adapter) -> Path | None:
        return None if name is None else self.folder / "swappable" / f"{name}.onnx_adapter"

    @contextmanager
    def model(self, name: Adapter) -> Iterator[Any]:
        """PEFT's model; without a name the base model."""
        if name is not None:
            yield self.models[name]
            return
        with self.models["first"].disable_adapter():
            yield self.models["first"]


def make_exports(family: str, folder: Path, *options: str, lora: Mapping[str, Any] = OTHER, **changes: Any) -> Exports:
    """Export two adapters of a tiny decoder.

    Args:
        options: Options of the command.
        lora: Options of the adapter `second`; those of `first` are UNEVEN.
        changes: Fields of the model's configuration.
    """
    base = tiny_base(folder / "base", family, **changes)
    models = {"first": tiny_lora(base, folder / "first"), "second": tiny_lora(base, folder / "second", **lora)}
    exported(family, folder / "first", folder / "merged", "--mode", "merged", *options)
    exported(family, [folder / "first", folder / "second"], folder / "swappable", "--mode", "swappable", *options)
    return Exports(folder, models)


def assert_model(exports: Exports, prompt: Tensor, tokens: int, feeds: Sequence[str] = tuple(FEEDS)) -> None:
    """Check that merged and swappable graphs give PEFT's logits and tokens."""
    for name in ADAPTERS:
        with exports.model(name) as model:
            errors = worst_error(exports.swappable(name), model, feeds)
            expected = torch_tokens(model, prompt, tokens)
        assert max(errors.values()) <= 1, errors
        assert genai_tokens(exports.folder / "swappable", prompt, tokens, exports.adapter(name)) == expected
        if name == "first":
            assert genai_tokens(exports.folder / "merged", prompt, tokens) == expected
    errors = worst_error(exports.merged, exports.models["first"], feeds)
    assert max(errors.values()) <= 1, errors


@dataclass(frozen=True)
class OnnxMade:
    """A base model, adapters `first` and `second` of it, and a graph of `second`, whose targets are fewer."""

    folder: Path

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def graph(self) -> Path:
        return self.folder / "graph"


def read_report(output: Path) -> OnnxReport:
    return OnnxReport.model_validate_json((output / "onnx_report.json").read_bytes())


@pytest.fixture
def quick_builder(monkeypatch: pytest.MonkeyPatch) -> None:
    """The builder of decoder graphs runs in a fork, which spares each graph 6 s of imports."""
    monkeypatch.setattr(decoder, "BuilderProcess", ForkedBuilder)
