"""Record by how much real engines are off from PyTorch: the noise by which the verdicts of verify are calibrated.

    cd tests && ../.venv/bin/python -m benchmarks.verify_noise [--only ENGINE]

SmolLM2 gets a LoRA of 12 steps on GSM8K. Each engine answers for the base model, the adapter, and the adapter at 0.8
and 1.2 times its strength; PyTorch answers for the first two in float32. Of each position the eight likeliest tokens
are kept that are among the 20 likeliest of every arm, as `tests/serve/noise/ENGINE.npz`.
"""

from __future__ import annotations

import gzip
import json
import shutil
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

from loraover.checkpoint.peft_adapter import TENSORS_FILE
from loraover.client.dialects import Speaker
from loraover.client.endpoint import Endpoint
from loraover.models.load import ModelSource, load_model, load_tokenizer, resolve_model
from loraover_serve.comparison.rounding import FORMATS
from loraover_serve.engines.answers import ADAPTER, BASE, Expected, Question, Row, Rows, window_rows
from loraover_serve.engines.endpoint import EndpointEngine
from loraover_serve.engines.sample import TokenRequest
from loraover_serve.engines.torch import torch_engine
from loraover_serve.verify.reference import Reference

from support.real_data import data_folder

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
NOISE = Path(__file__).parents[1] / "serve" / "noise"
FACTORS = {"weak": 0.8, "strong": 1.2}
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 48, 32, 8
STEPS, BATCH, LENGTH, RATE = 12, 4, 64, 1e-3
TOP, KEPT = 20, 8
ARMS = (BASE, ADAPTER, *FACTORS)
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
def in_vllm(source: ModelSource, reference: Reference, folder: Path) -> Iterator[Answer]:
    """The vLLM in $LORAOVER_VLLM, in bfloat16."""
    from loraover_serve.vllm.serve import serve_adapters

    from support.vllm_command import vllm_command

    options = ["--dtype", "bfloat16", "--enforce-eager", "--max-model-len", "128"]
    served = [folder / arm for arm in ARMS if arm != BASE]
    log = folder / "vllm.log"
    with serve_adapters(served, model=source.location, vllm=vllm_command(), log=log, options=options) as server:
        base = next(name for name in server.models() if name not in server.names)
        names = {BASE: base} | {name: name for name in server.names}
        engine = EndpointEngine(Speaker(Endpoint(server.url), load_tokenizer(source), base), names, ())
        yield partial(engine.logprobs, questions=reference.questions)


@contextmanager
def in_torch(name: str, source: ModelSource, reference: Reference, folder: Path) -> Iterator[Answer]:
    """PyTorch with the base model's weights in a coarser number format."""

    def load() -> Any:
        model = load_model(source)
        for weight in model.parameters():
            weight.data = FORMATS[name].weights(weight.data)
        return model

    engine = torch_engine(load, {arm: folder / arm for arm in ARMS if arm != BASE}, None)

    def answer(arm: str) -> Rows:
        found = engine.logits(arm, [q.tokens for q in reference.questions])
        return [r for i, logits in enumerate(found) for r in window_rows(i, reference.questions[i], logits)]

    yield answer


def make_plain_reference(source: ModelSource, folder: Path, asked: Sequence[tuple[int, ...]]) -> Reference:
    """PyTorch's answers in float32, without those in bfloat16."""
    engine = torch_engine(partial(load_model, source), {ADAPTER: folder / ADAPTER}, None)
    answers = engine.run(ADAPTER, 0, 0, [TokenRequest(prompt, NEW_TOKENS) for prompt in asked])
    questions = tuple(Question(p, answer.token_ids) for p, answer in zip(asked, answers, strict=True))
    rows = {}
    for arm in (BASE, ADAPTER):
        found = engine.logits(arm, [q.tokens for q in questions])
        rows[arm] = [r for i, logits in enumerate(found) for r in window_rows(i, questions[i], logits)]
    return Reference("PEFT", questions, Expected(rows[BASE]), Expected(rows[ADAPTER]), 1.0)


@contextmanager
def in_llamacpp(kind: str, source: ModelSource, reference: Reference, folder: Path) -> Iterator[Answer]:
    """llama.cpp with a base model whose matrices are quantised by gguf-py."""
    from loraover_export import export_gguf
    from loraover_export.gguf.base import write_base
    from loraover_export.gguf.llamacpp import LlamaCppModel

    exact, base = folder / "exact.gguf", folder / f"{kind}.gguf"
    if not exact.exists():
        write_base(load_model(source), exact)
        for arm in ARMS[1:]:
            export_gguf(folder / arm, folder / f"{arm}.gguf", model=source.name)
    quantise(exact, base, kind)
    with ExitStack() as stack:
        running = {
            arm: stack.enter_context(LlamaCppModel(base, None if arm == BASE else folder / f"{arm}.gguf", threads=2))
            for arm in ARMS
        }

        def answer(arm: str) -> Rows:
            found = [(q, running[arm].logits(q.tokens)) for q in reference.questions]
            return [row for i, (question, logits) in enumerate(found) for row in window_rows(i, question, logits)]

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
def in_onnx(source: ModelSource, reference: Reference, folder: Path) -> Iterator[Answer]:
    """ONNX Runtime with a swappable graph whose matrices are rounded to int4."""
    from loraover_export import export_onnx
    from loraover_serve.engines.onnx import OnnxArm, OnnxEngine

    graph, names = folder / "onnx", ARMS[1:]
    paths = [folder / arm for arm in names]
    export_onnx(paths, graph, mode="swappable", model=source.name, names=names, precision="int4", check=False)
    arms = {BASE: OnnxArm(graph)} | {name: OnnxArm(graph, graph / f"{name}.onnx_adapter") for name in names}
    engine = OnnxEngine("onnx", arms)

    def answer(arm: str) -> Rows:
        found = zip(reference.questions, engine.logits(arm, [q.tokens for q in reference.questions]), strict=True)
        return [row for i, (question, logits) in enumerate(found) for row in window_rows(i, question, logits)]

    yield answer


ENGINES: dict[str, Callable[..., Any]] = {
    "vllm-bf16": in_vllm,
    "onnx-int4": in_onnx,
    "llamacpp-q8": partial(in_llamacpp, "Q8_0"),
    "llamacpp-q4": partial(in_llamacpp, "Q4_0"),
    "torch-fp8": partial(in_torch, "fp8"),
}
"""The engines, by the names of their files."""


def differences(answers: Mapping[str, Rows], reference: Reference) -> dict[str, NDArray[np.float16]]:
    """What is kept of an engine's answers: arrays of shape (prompts, positions, tokens), in nats.

    Returns:
        `likely`, PyTorch's logprobs of the base model; `effect`, what the adapter adds to them in PyTorch; and by the
        name of each arm how far the engine is from PyTorch: its base model from the base model, the others from the
        adapter. NaN stands where fewer tokens are among the 20 likeliest of all arms.
    """
    shape = (len(reference.questions), NEW_TOKENS, KEPT)
    found = {name: np.full(shape, np.nan, dtype=np.float16) for name in ("likely", "effect", *ARMS)}
    places = {arm: {(row.question, row.position): row for row in rows} for arm, rows in answers.items()}
    for index, question in enumerate(reference.questions):
        for step, position in enumerate(question.answered):
            rows = {arm: rows[index, position] for arm, rows in places.items()}
            base, adapter = (each.at(index, position).astype(float) for each in (reference.base, reference.adapter))
            shared = set.intersection(*(set(row.ids.tolist()) for row in rows.values() if row.ids is not None))
            ids = sorted(shared, key=lambda id_: -adapter[id_])[:KEPT]
            told = {"likely": base[ids], "effect": adapter[ids] - base[ids]}
            for arm, row in rows.items():
                assert row.ids is not None
                by_id = dict(zip(row.ids.tolist(), row.logprobs.astype(float), strict=True))
                told[arm] = np.array([by_id[id_] for id_ in ids]) - (base if arm == BASE else adapter)[ids]
            for name, values in told.items():
                found[name][index, step, : len(ids)] = values
    return found


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
        reference = make_plain_reference(source, folder, asked)
        for name in only or ENGINES:
            with ENGINES[name](source, reference, folder) as answer:
                answers = {arm: likeliest(answer(arm)) for arm in ARMS}
            NOISE.mkdir(exist_ok=True)
            kept: dict[str, Any] = differences(answers, reference)
            np.savez_compressed(NOISE / f"{name}.npz", **kept)
            click.echo(f"wrote {NOISE / name}.npz")


if __name__ == "__main__":
    main()
