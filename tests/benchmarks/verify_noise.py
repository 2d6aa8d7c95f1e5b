"""Record by how much real engines are off from PyTorch: the noise by which the verdicts of verify are calibrated.

    cd tests && ../.venv/bin/python -m benchmarks.verify_noise [--only ENGINE] [--served]

SmolLM2 gets a LoRA of 12 steps on GSM8K. Each engine answers for the base model, the adapter, the adapter at 0.8 and
1.2 times its strength, and once more for the base model; PyTorch answers in float32. Of each position the eight
likeliest tokens are kept that are among the 20 likeliest of every arm, as `tests/serve/noise/ENGINE.npz`. With
--served, PyTorch answers on the weights that the engine has, and what is kept lies in `tests/serve/noise/served`.
"""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from loraover.checkpoint.files import TENSORS_FILE
from loraover.checkpoint.source import read_source
from loraover.client.endpoint import Endpoint
from loraover.common.reporter import SILENT
from loraover.models.load import ModelSource, load_model, load_tokenizer, resolve_model
from loraover_serve.comparison.rounding import FORMATS
from loraover_serve.comparison.served_weights import open_if_given
from loraover_serve.engines.answers import kept_rows
from loraover_serve.engines.endpoint import EndpointEngine, speak_as
from loraover_serve.engines.torch import torch_engine
from loraover_serve.judge.case import Case
from loraover_serve.judge.evidence import Evidence
from loraover_serve.judge.limits import ADAPTER, BASE
from loraover_serve.judge.models import Answers, Row, Rows
from loraover_serve.verify.by_pytorch import make_subject
from loraover_serve.verify.pytorch import TorchModels, make_models

from support.real_data import data_folder
from support.recorded_noise import NOISE

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"

FACTORS = {"weak": 0.8, "strong": 1.2}
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 48, 32, 8
STEPS, BATCH, LENGTH, RATE = 12, 4, 64, 1e-3
PATIENCE_S = 600.0
TOP, KEPT = 20, 8
ADAPTERS = (ADAPTER, *FACTORS)
AGAIN = "again"
ARMS = (BASE, *ADAPTERS, AGAIN)
"""What an engine is asked for; "again" is the base model, as an adapter that is not applied."""
Answer = Callable[[str, TorchModels], Rows]
"""Answers of an engine, by the arm, to the questions of PyTorch's models."""


def make_adapters(source: ModelSource, folder: Path, texts: Sequence[str]) -> None:
    """Train a LoRA for a few steps, and write it as `adapter`, and with a scaled B as `weak` and `strong`."""
    tokenizer = load_tokenizer(source)
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(load_model(source), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    model.train()
    for step in range(STEPS):
        for text in texts[BATCH * step : BATCH * (step + 1)]:
            ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=LENGTH).input_ids
            (model(input_ids=ids, labels=ids).loss / BATCH).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / ADAPTER)
    for name, factor in FACTORS.items():
        shutil.copytree(folder / ADAPTER, folder / name)
        file = folder / name / TENSORS_FILE
        scaled = {key: factor * t if "lora_B" in key else t for key, t in load_file(file).items()}
        save_file(scaled, file, metadata={"format": "pt"})


def likeliest(rows: Rows) -> dict[int, Row]:
    """The rows with their 20 likeliest tokens, as a server gives them."""
    return {p: dict(sorted(row.items(), key=lambda pair: pair[1])[-TOP:]) for p, row in rows.items()}


@contextmanager
def in_vllm(number_format: str, source: ModelSource, folder: Path, arms: Sequence[str] = ADAPTERS) -> Iterator[Answer]:
    """The vLLM in $LORAOVER_VLLM."""
    from loraover_serve.vllm.serve import serve_adapters

    from support.vllm_command import vllm_command

    options = ["--dtype", number_format, "--enforce-eager", "--max-model-len", "128"]
    served = [folder / arm for arm in arms]
    log = folder / "vllm.log"
    with serve_adapters(served, model=source.location, vllm=vllm_command(), log=log, options=options) as server:
        base = next(name for name in server.models() if name not in server.names)
        names = {BASE: base} | {name: name for name in server.names}
        engine = EndpointEngine(speak_as(Endpoint(server.url), base, load_tokenizer(source)), names, source)
        yield engine.logprobs


@contextmanager
def in_torch(name: str, source: ModelSource, folder: Path, arms: Sequence[str] = ADAPTERS) -> Iterator[Answer]:
    """PyTorch with the base model's weights in a coarser number format."""

    def load() -> Any:
        model = load_model(source)
        for weight in model.parameters():
            weight.data = FORMATS[name].weights(weight.data)
        return model

    load().save_pretrained(folder / name)
    yield torch_engine(load, {arm: folder / arm for arm in arms}, None).logprobs


@contextmanager
def in_llamacpp(kind: str, source: ModelSource, folder: Path, arms: Sequence[str] = ADAPTERS) -> Iterator[Answer]:
    """llama.cpp with a base model whose matrices are quantised by gguf-py."""
    from loraover_export import export_gguf
    from loraover_export.formats.gguf.base import write_base
    from loraover_export.formats.gguf.llamacpp import LlamaCppModel

    exact, base = folder / "exact.gguf", folder / f"{kind}.gguf"
    if not exact.exists():
        write_base(load_model(source), exact)
        for arm in arms:
            export_gguf(folder / arm, folder / f"{arm}.gguf", model=source.name)
    quantise(exact, base, kind)
    with ExitStack() as stack:
        running = {
            arm: stack.enter_context(LlamaCppModel(base, None if arm == BASE else folder / f"{arm}.gguf", threads=2))
            for arm in (BASE, *arms)
        }

        def answer(arm: str, models: TorchModels) -> Rows:
            found = enumerate(running[arm].logits(question.tokens) for question in models.questions)
            rows = (kept_rows(models, index, logits, "llamacpp") for index, logits in found)
            return {place: row for mine in rows for place, row in mine.items()}

        yield answer


def quantise(exact: Path, output: Path, kind: str) -> None:
    """Quantise the matrices of a GGUF file: by llama.cpp for Q4_K_M, which mixes types, and else by gguf-py."""
    import gguf
    from gguf.quants import quantize

    if kind == "Q4_K_M":
        from llama_cpp_py_sync._cffi_bindings import ffi, get_lib

        settings = ffi.new("llama_model_quantize_params *", get_lib().llama_model_quantize_default_params())
        settings.ftype = gguf.LlamaFileType.MOSTLY_Q4_K_M
        assert get_lib().llama_model_quantize(str(exact).encode(), str(output).encode(), settings) == 0
        return

    reader, chosen = gguf.GGUFReader(exact), gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(output, str(reader.fields["general.architecture"].contents()))
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            element = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=element)
    for tensor in reader.tensors:
        if len(tensor.shape) == 2:
            writer.add_tensor(tensor.name, quantize(np.array(tensor.data), chosen), raw_dtype=chosen)
        else:
            writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@contextmanager
def in_onnx(precision: str, source: ModelSource, folder: Path, arms: Sequence[str] = ADAPTERS) -> Iterator[Answer]:
    """ONNX Runtime with a swappable graph in fp32, or with matrices that are rounded to int4."""
    from loraover_export import export_onnx
    from loraover_serve.engines.onnx import OnnxArm, OnnxEngine

    graph, paths = folder / f"onnx-{precision}", [folder / arm for arm in arms]
    if not graph.exists():
        export_onnx(paths, graph, mode="swappable", model=source.name, names=arms, precision=precision, check=False)
    served = {BASE: OnnxArm(graph)} | {name: OnnxArm(graph, graph / f"{name}.onnx_adapter") for name in arms}
    yield OnnxEngine("onnx", served).logprobs


@contextmanager
def in_mlx(source: ModelSource, folder: Path, arms: Sequence[str] = ADAPTERS) -> Iterator[Answer]:
    """mlx-lm in the environment of $LORAOVER_MLX, with a base model that its converter quantises to 4 bits."""
    from loraover.adapters.base_weights import folder_of
    from loraover_export.formats.mlx import export_mlx
    from loraover_serve.engines.mlx import MlxEngine

    scratch = folder / "mlx"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    words = ["-m", "mlx_lm", "convert", "-q", "--q-bits", "4", "--hf-path", str(folder_of(source))]
    subprocess.run([str(MlxEngine.python()), *words, "--mlx-path", str(scratch / BASE)], check=True)
    made = [export_mlx(folder / arm, scratch / arm, model=source.location) for arm in arms]
    adapters = {BASE: None} | {arm: str(scratch / arm) for arm in arms}
    arguments = {"model": str(scratch / BASE), "settings": made[0].lost_settings, "adapters": adapters}
    with MlxEngine.run(arguments, scratch / "log", PATIENCE_S) as runner:
        yield MlxEngine(runner, scratch).logprobs


@contextmanager
def in_openvino(source: ModelSource, folder: Path, arms: Sequence[str] = ADAPTERS) -> Iterator[Answer]:
    """OpenVINO GenAI in the environment of $LORAOVER_OPENVINO, with int4 weights of optimum-intel in groups of 64."""
    from loraover.adapters.base_weights import folder_of
    from loraover_export import export_vllm
    from loraover_serve.engines.openvino import CONVERT, OpenVinoEngine

    scratch = folder / "openvino"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    words = ["export", "openvino", "--task", "text-generation-with-past", "--disable-convert-tokenizer"]
    words += ["--weight-format", "int4", "--group-size", "64", "--model", str(folder_of(source).resolve())]
    subprocess.run([str(OpenVinoEngine.python()), "-I", "-c", CONVERT, *words, str(scratch / BASE)], check=True)
    adapters: dict[str, str | None] = {BASE: None}
    for arm in arms:
        export_vllm(folder / arm, scratch / arm)
        adapters[arm] = str(scratch / arm / TENSORS_FILE)
    arguments = {"model": str(scratch / BASE), "adapters": adapters}
    with OpenVinoEngine.run(arguments, scratch / "log", PATIENCE_S) as runner:
        yield OpenVinoEngine(runner, scratch).logprobs


@contextmanager
def in_nf4(source: ModelSource, folder: Path, arms: Sequence[str] = ADAPTERS) -> Iterator[Answer]:
    """PyTorch with a base model that bitsandbytes quantises to nf4."""
    engine = torch_engine(
        lambda: load_model(source, quantization="nf4", device="cpu"), {arm: folder / arm for arm in arms}, None
    )
    load_model(source, quantization="nf4", device="cpu").save_pretrained(folder / "nf4")
    yield engine.logprobs


ENGINES: dict[str, Callable[..., Any]] = {
    "onnx-fp32": partial(in_onnx, "fp32"),
    "vllm-bf16": partial(in_vllm, "bfloat16"),
    "torch-fp8": partial(in_torch, "fp8"),
    "llamacpp-q8": partial(in_llamacpp, "Q8_0"),
    "llamacpp-q4": partial(in_llamacpp, "Q4_0"),
    "llamacpp-q4-1": partial(in_llamacpp, "Q4_1"),
    "llamacpp-q4-k-m": partial(in_llamacpp, "Q4_K_M"),
    "mlx-int4": in_mlx,
    "onnx-int4": partial(in_onnx, "int4"),
    "openvino-int4": in_openvino,
    "torch-nf4": in_nf4,
}
"""The engines, by the names of their files."""

SERVED = {
    "torch-fp8": "fp8",
    "llamacpp-q8": "Q8_0.gguf",
    "llamacpp-q4": "Q4_0.gguf",
    "llamacpp-q4-1": "Q4_1.gguf",
    "llamacpp-q4-k-m": "Q4_K_M.gguf",
    "mlx-int4": "mlx/base",
    "onnx-int4": "onnx-int4",
    "openvino-int4": "openvino/base",
    "torch-nf4": "nf4",
}
"""Weights of the base model that engines have, in the folder of the recording."""


class Subject:
    """An adapter in PyTorch, as the judge of verify has it.

    Args:
        folder: The adapter.
        asked: Token ids of each prompt.
        weights: Weights of the base model that the engine has; None: those of the base model.
        steps: Positions of each answer.
        kept: Tokens that are kept of each position.
    """

    def __init__(
        self,
        source: ModelSource,
        folder: Path,
        asked: Sequence[tuple[int, ...]],
        weights: Path | None = None,
        *,
        steps: int = NEW_TOKENS,
        kept: int = KEPT,
    ) -> None:
        adapter = read_source(folder)
        how: dict[str, Any] = {"subject": make_subject(adapter, source)}
        with open_if_given(weights) as served:
            self.models = make_models(adapter, source, asked, steps, "cpu", SILENT, weights=served, **how)
        self._shape = (len(asked), steps, kept)

    def kept(self, answers: Mapping[str, Rows]) -> dict[str, Any]:
        """What is kept of an engine's answers.

        Returns:
            Arrays of shape (prompts, positions, tokens), in nats: `likely`, PyTorch's logprobs of the base model;
            `effect`, what the adapter adds to them in PyTorch; by the name of each arm how far the engine is from
            PyTorch: the base model, asked for once or again, from the base model, the others from the adapter. NaN
            stands where fewer tokens are among the 20 likeliest of all arms. And the judge's own numbers:
            `number_format`, its `bias` and `sensitivity`.
        """
        names = ("likely", "effect", *answers)
        found: dict[str, Any] = {name: np.full(self._shape, np.nan, dtype=np.float16) for name in names}
        for place, (index, step) in enumerate(self.models.places):
            if step >= 0:
                told = self._told(place, {arm: rows[place] for arm, rows in answers.items()})
                for name, values in told.items():
                    found[name][index, step, : len(values)] = values
        case = Case(Evidence(self.models, Answers(answers[BASE], answers[ADAPTER])))
        format_, bias = str(case.number_format), case.bias_in(case.number_format)
        return found | {"number_format": format_, "bias": bias, "sensitivity": self.models.sensitivity}

    def _told(self, place: int, rows: Mapping[str, Row]) -> dict[str, NDArray[np.float64]]:
        """The arrays' values at one place."""
        shared = set.intersection(*({*row} for row in rows.values()))
        expected = {arm: self.models.expected[arm].at(*self.models.position(place)) for arm in (BASE, ADAPTER)}
        ids = [id_ for id_ in np.argsort(-expected[ADAPTER]).tolist() if id_ in shared][: self._shape[-1]]
        base, right = (expected[arm][ids].astype(np.float64) for arm in (BASE, ADAPTER))
        told = {"likely": base, "effect": right - base}
        for arm, row in rows.items():
            told[arm] = np.array([row[id_] for id_ in ids]) - (right if arm in ADAPTERS else base)
        return told


@click.command()
@click.option("--only", type=click.Choice(list(ENGINES)), multiple=True, help="Engine to record; all by default.")
@click.option("--work", type=click.Path(path_type=Path), help="Folder for adapters and graphs, which are used again.")
@click.option("--served", is_flag=True, help="Run PyTorch on the weights that the engine has.")
def main(only: Sequence[str], work: Path | None, served: bool) -> None:
    """Record the noise of real engines."""
    source = resolve_model(MODEL)
    with gzip.open(data_folder() / "gsm8k" / "train.jsonl.gz", "rt", encoding="utf-8") as lines:
        problems = [json.loads(line) for line in lines]
    tokenizer = load_tokenizer(source)
    asked = [tuple(tokenizer(each["question"]).input_ids[:PROMPT_TOKENS]) for each in problems[-PROMPTS:]]
    with tempfile.TemporaryDirectory(prefix="loraover-noise-") as scratch:
        folder = work or Path(scratch)
        folder.mkdir(exist_ok=True)
        if not (folder / "strong").exists():
            make_adapters(source, folder, [f"{each['question']}\n{each['answer']}" for each in problems])
        subject = None if served else Subject(source, folder / ADAPTER, asked)
        output = NOISE / "served" if served else NOISE
        for name in only or (SERVED if served else ENGINES):
            with ENGINES[name](source, folder) as answer:
                mine = subject or Subject(source, folder / ADAPTER, asked, folder / SERVED[name])
                answers = {arm: likeliest(answer(BASE if arm == AGAIN else arm, mine.models)) for arm in ARMS}
            output.mkdir(parents=True, exist_ok=True)
            np.savez_compressed(output / f"{name}.npz", **mine.kept(answers))
            click.echo(f"wrote {output / name}.npz")


if __name__ == "__main__":
    main()
