"""Record by how much real engines are off from PyTorch: the noise by which the verdicts of verify are calibrated.

    cd tests && ../.venv/bin/python -m benchmarks.verify_noise [--only ENGINE]

SmolLM2 gets a LoRA of 12 steps on GSM8K. Each engine answers for the base model, the adapter, the adapter at 0.8 and
1.2 times its strength, and once more for the base model; PyTorch answers in float32. Of each position the eight
likeliest tokens are kept that are among the 20 likeliest of every arm, as `tests/serve/noise/ENGINE.npz`.
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
from loraover.checkpoint.peft_adapter import read_source
from loraover.client.endpoint import Endpoint
from loraover.common.reporter import SILENT
from loraover.models.load import ModelSource, load_model, load_tokenizer, resolve_model
from loraover_serve.comparison.rounding import FORMATS
from loraover_serve.engines.answers import ADAPTER, BASE, Row, Rows, last_rows
from loraover_serve.engines.endpoint import EndpointEngine, speak_as
from loraover_serve.engines.torch import torch_engine
from loraover_serve.verify.evidence import Answers
from loraover_serve.verify.judge import EngineJudge
from loraover_serve.verify.reference import TorchReference, make_reference
from loraover_serve.verify.run import make_subject
from loraover_serve.verify.variants import Variants

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
Answer = Callable[[str], Rows]


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


def likeliest(rows: Rows) -> list[Row]:
    """The rows with their 20 likeliest tokens, as a server gives them."""
    kept = []
    for row in rows:
        likely = np.argsort(row.logprobs)[-TOP:]
        ids = likely if row.ids is None else row.ids[likely]
        kept.append(Row(row.question, row.position, row.logprobs[likely], ids.astype(np.int64)))
    return kept


@contextmanager
def in_vllm(source: ModelSource, reference: TorchReference, folder: Path) -> Iterator[Answer]:
    """The vLLM in $LORAOVER_VLLM, in bfloat16."""
    from loraover_serve.vllm.serve import serve_adapters

    from support.vllm_command import vllm_command

    options = ["--dtype", "bfloat16", "--enforce-eager", "--max-model-len", "128"]
    served = [folder / arm for arm in ADAPTERS]
    log = folder / "vllm.log"
    with serve_adapters(served, model=source.location, vllm=vllm_command(), log=log, options=options) as server:
        base = next(name for name in server.models() if name not in server.names)
        names = {BASE: base} | {name: name for name in server.names}
        engine = EndpointEngine(speak_as(Endpoint(server.url), base, load_tokenizer(source)), names, source)
        yield partial(engine.logprobs, questions=reference.questions)


@contextmanager
def in_torch(name: str, source: ModelSource, reference: TorchReference, folder: Path) -> Iterator[Answer]:
    """PyTorch with the base model's weights in a coarser number format."""

    def load() -> Any:
        model = load_model(source)
        for weight in model.parameters():
            weight.data = FORMATS[name].weights(weight.data)
        return model

    engine = torch_engine(load, {arm: folder / arm for arm in ADAPTERS}, None)
    yield partial(engine.logprobs, questions=reference.questions)


@contextmanager
def in_llamacpp(kind: str, source: ModelSource, reference: TorchReference, folder: Path) -> Iterator[Answer]:
    """llama.cpp with a base model whose matrices are quantised by gguf-py."""
    from loraover_export import export_gguf
    from loraover_export.formats.gguf.base import write_base
    from loraover_export.formats.gguf.llamacpp import LlamaCppModel

    exact, base = folder / "exact.gguf", folder / f"{kind}.gguf"
    if not exact.exists():
        write_base(load_model(source), exact)
        for arm in ADAPTERS:
            export_gguf(folder / arm, folder / f"{arm}.gguf", model=source.name)
    quantise(exact, base, kind)
    with ExitStack() as stack:
        running = {
            arm: stack.enter_context(LlamaCppModel(base, None if arm == BASE else folder / f"{arm}.gguf", threads=2))
            for arm in (BASE, *ADAPTERS)
        }

        def answer(arm: str) -> Rows:
            found = [(q, running[arm].logits(q.tokens)) for q in reference.questions]
            return [row for i, (question, logits) in enumerate(found) for row in last_rows(i, question.window, logits)]

        yield answer


def quantise(exact: Path, output: Path, kind: str) -> None:
    """Quantise the matrices of a GGUF file."""
    import gguf
    from gguf.quants import quantize

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
def in_onnx(precision: str, source: ModelSource, reference: TorchReference, folder: Path) -> Iterator[Answer]:
    """ONNX Runtime with a swappable graph in fp32, or with matrices that are rounded to int4."""
    from loraover_export import export_onnx
    from loraover_serve.engines.onnx import OnnxArm, OnnxEngine

    graph, names = folder / f"onnx-{precision}", ADAPTERS
    paths = [folder / arm for arm in names]
    shutil.rmtree(graph, ignore_errors=True)
    export_onnx(paths, graph, mode="swappable", model=source.name, names=names, precision=precision, check=False)
    arms = {BASE: OnnxArm(graph)} | {name: OnnxArm(graph, graph / f"{name}.onnx_adapter") for name in names}
    yield partial(OnnxEngine("onnx", arms).logprobs, questions=reference.questions)


@contextmanager
def in_mlx(source: ModelSource, reference: TorchReference, folder: Path) -> Iterator[Answer]:
    """mlx-lm in the environment of $LORAOVER_MLX, with a base model that its converter quantises to 4 bits."""
    from loraover.adapters.base_weights import folder_of
    from loraover_export.formats.mlx import export_mlx
    from loraover_serve.engines.mlx import MlxEngine

    scratch = folder / "mlx"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    words = ["-m", "mlx_lm", "convert", "-q", "--q-bits", "4", "--hf-path", str(folder_of(source))]
    subprocess.run([str(MlxEngine.python()), *words, "--mlx-path", str(scratch / BASE)], check=True)
    made = [export_mlx(folder / arm, scratch / arm, model=source.location) for arm in ADAPTERS]
    adapters = {BASE: None} | {arm: str(scratch / arm) for arm in ADAPTERS}
    arguments = {"model": str(scratch / BASE), "settings": made[0].lost_settings, "adapters": adapters}
    with MlxEngine.run(arguments, scratch / "log", PATIENCE_S) as runner:
        yield partial(MlxEngine(runner, scratch).logprobs, questions=reference.questions)


ENGINES: dict[str, Callable[..., Any]] = {
    "onnx-fp32": partial(in_onnx, "fp32"),
    "vllm-bf16": in_vllm,
    "torch-fp8": partial(in_torch, "fp8"),
    "llamacpp-q8": partial(in_llamacpp, "Q8_0"),
    "llamacpp-q4": partial(in_llamacpp, "Q4_0"),
    "mlx-int4": in_mlx,
    "onnx-int4": partial(in_onnx, "int4"),
}
"""The engines, by the names of their files."""


class Subject:
    """The adapter in PyTorch, as the judge of verify has it.

    Args:
        source: The base model.
        folder: Folder of the adapters.
        asked: Token ids of the prompts.
    """

    def __init__(self, source: ModelSource, folder: Path, asked: Sequence[tuple[int, ...]]) -> None:
        adapter = read_source(folder / ADAPTER)
        self.reference = make_reference(adapter, source, asked, NEW_TOKENS, "cpu", SILENT)
        variants = Variants(adapter, source, "cpu", self.reference.questions)
        self.judge = EngineJudge(self.reference, variants, make_subject(adapter, source))

    def kept(self, answers: Mapping[str, Rows]) -> dict[str, Any]:
        """What is kept of an engine's answers.

        Returns:
            Arrays of shape (prompts, positions, tokens), in nats: `likely`, PyTorch's logprobs of the base model;
            `effect`, what the adapter adds to them in PyTorch; by the name of each arm how far the engine is from
            PyTorch: the base model, asked for once or again, from the base model, the others from the adapter. NaN
            stands where fewer tokens are among the 20 likeliest of all arms. And the judge's own numbers:
            `number_format`, its `bias` and `sensitivity`.
        """
        shape = (len(self.reference.questions), NEW_TOKENS, KEPT)
        names = ("likely", "effect", *ARMS)
        found: dict[str, Any] = {name: np.full(shape, np.nan, dtype=np.float16) for name in names}
        places = {arm: {(row.question, row.position): row for row in rows} for arm, rows in answers.items()}
        for index, question in enumerate(self.reference.questions):
            for step, position in enumerate(question.answered):
                told = self._told({arm: rows[index, position] for arm, rows in places.items()})
                for name, values in told.items():
                    found[name][index, step, : len(values)] = values
        case = self.judge.case(Answers(answers[BASE], answers[ADAPTER], ()))
        format_ = str(case.number_format)
        return found | {"number_format": format_, "bias": case.bias, "sensitivity": self.reference.sensitivity}

    def _told(self, rows: Mapping[str, Row]) -> dict[str, NDArray[np.float64]]:
        """The arrays' values at one position."""
        shared = set.intersection(*(set(row.ids.tolist()) for row in rows.values() if row.ids is not None))
        place = (rows[BASE].question, rows[BASE].position)
        likely = np.argsort(-self.reference.adapter.at(*place))
        ids = [id_ for id_ in likely.tolist() if id_ in shared][:KEPT]
        base, right = (
            each.at(*place)[ids].astype(np.float64) for each in (self.reference.base, self.reference.adapter)
        )
        told = {"likely": base, "effect": right - base}
        for arm, row in rows.items():
            assert row.ids is not None
            by_id = dict(zip(row.ids.tolist(), row.logprobs.astype(np.float64), strict=True))
            told[arm] = np.array([by_id[id_] for id_ in ids]) - (right if arm in ADAPTERS else base)
        return told


@click.command()
@click.option("--only", type=click.Choice(list(ENGINES)), multiple=True, help="Engine to record; all by default.")
@click.option("--work", type=click.Path(path_type=Path), help="Folder for adapters and graphs, which are used again.")
def main(only: Sequence[str], work: Path | None) -> None:
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
        subject = Subject(source, folder, asked)
        for name in only or ENGINES:
            with ENGINES[name](source, subject.reference, folder) as answer:
                answers = {arm: likeliest(answer(BASE if arm == AGAIN else arm)) for arm in ARMS}
            NOISE.mkdir(exist_ok=True)
            np.savez_compressed(NOISE / f"{name}.npz", **subject.kept(answers))
            click.echo(f"wrote {NOISE / name}.npz")


if __name__ == "__main__":
    main()
