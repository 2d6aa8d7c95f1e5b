"""Adapters swapped in onnxruntime-web: their files, and logits in node and in headless Chromium against PyTorch's."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from loraover_export.formats.onnx.report import ENGINE_FACTOR

from support.make_checkpoint import edit_json, save_tokenizer
from support.onnx_export import LINEAR, OTHER, export, exported, tiny_base, tiny_lora
from support.onnx_graph import FEEDS, torch_logits
from support.plain_adapter import write_adapter
from support.refusals import Refused
from support.tiny_models import tiny_bert, tiny_t5
from support.web_runtime import ENGINES, WebRun, ask_chromium, ask_node, command, in_node, web_scripts

pytestmark = pytest.mark.engine

WEB = ("--mode", "swappable", "--web")
ADAPTERS = {
    None: None,
    "first": "web/first.safetensors",
    "second": "web/second.safetensors",
    "late": "more/late.safetensors",
}
FED = ("one row", "batch", "a longer second step", "cached, padded on the left")


@dataclass(frozen=True)
class Web:
    """A graph with two adapters, and a third one that joined it later."""

    root: Path
    models: dict[str, PeftModel]

    @property
    def graph(self) -> Path:
        return self.root / "web"

    def logits(self, feed: str, *, double: bool = False) -> dict[str | None, Tensor]:
        """PyTorch's logits with each adapter, and without one."""
        found: dict[str | None, Tensor] = {}
        for name, model in self.models.items():
            model.double() if double else model.float()  # exact: the weights are those of float32
            found[name] = torch_logits(model, FEEDS[feed])
        with model.disable_adapter():
            found[None] = torch_logits(model, FEEDS[feed])
        model.float()
        return found


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Web:
    root = tmp_path_factory.mktemp("web")
    base = tiny_base(root / "base", "Llama")
    models = {"first": tiny_lora(base, root / "first"), "second": tiny_lora(base, root / "second", **OTHER)}
    exported("Llama", [root / "first", root / "second"], root / "web", *WEB)
    models["late"] = tiny_lora(base, root / "late", r=2, rank_pattern={"up_proj": 3}, alpha_pattern={})
    exported("Llama", root / "late", root / "more", *WEB, "--graph", str(root / "web"))
    return Web(root, models)


@pytest.fixture(scope="module")
def scripts(web: Web) -> Iterator[Path]:
    with web_scripts(web.root) as folder:
        yield folder


# Files


def test_an_adapter_fills_every_input_of_the_graph(web: Web) -> None:
    graph = onnx.load(web.graph / "model.onnx", load_external_data=False).graph
    shapes = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in graph.input}
    inputs = {name for name in shapes if "lora" in name}
    assert len(inputs) == 2 * 2 * len(LINEAR)
    assert not inputs & {tensor.name for tensor in graph.initializer}, "onnxruntime-web refuses inputs with a default"
    for name, file in ADAPTERS.items():
        if file is None:
            continue
        tensors = load_file(web.root / file)
        assert tensors.keys() == inputs, name
        for key, tensor in tensors.items():
            assert tensor.dtype == torch.float32
            assert [size for size, free in zip(tensor.shape, shapes[key], strict=True) if free] == [max(shapes[key])]


def test_the_file_holds_pefts_matrices_with_the_scaling_in_b(web: Web) -> None:
    stored = load_file(web.root / "second" / "adapter_model.safetensors")
    found = load_file(web.graph / "second.safetensors")
    for key, matrix in stored.items():
        name = key.removeprefix("base_model.model.").replace("self_attn", "attn").replace(".weight", ".MatMul.weight")
        scaling = 6 / 3 if "lora_B" in key else 1.0  # 6 / sqrt(9)
        assert torch.equal(found.pop(name), scaling * matrix.mT), name
    assert all(tensor.numel() == 0 for tensor in found.values())
    with safe_open(web.graph / "second.safetensors", framework="pt") as file:
        assert file.metadata()["base_model"] == str(web.root / "base")


def test_an_adapter_joins_a_web_graph_without_the_option(web: Web, tmp_path: Path) -> None:
    """As precision and device, it is the graph's."""
    options = ("--mode", "swappable", "--no-check", "--graph", str(web.graph))
    assert export(web.root / "late", tmp_path / "out", *options) == 0
    assert (tmp_path / "out" / "late.safetensors").read_bytes() == (web.root / "more/late.safetensors").read_bytes()


def test_a_graph_of_another_kind_is_refused(web: Web, tmp_path: Path, refused: Refused) -> None:
    graph = shutil.copytree(web.graph, tmp_path / "graph")
    edit_json(graph / "onnx_report.json", lambda report: report.pop("web"))  # as written before there was --web
    refused("onnx", web.root / "late", *WEB, "--graph", graph, named=("exported without --web",))


def test_int4_gets_a_warning(web: Web, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(web.root / "first", tmp_path / "out", *WEB, "--precision", "int4", "--no-check") == 0
    assert "onnxruntime-web computes int4" in capsys.readouterr().out


# Logits


def worst_errors(expected: dict[str | None, Tensor], found: dict[str | None, Tensor]) -> dict[str | None, float]:
    return {name: float((found[name] - expected[name]).abs().max()) for name in found}


def allowed(base_error: float, expected: dict[str | None, Tensor], name: str) -> float:
    """Largest error with an adapter, from the base model's on the same tokens; roundings grow with the logits.

    The factor is that between the largest errors of two runs with the same noise; see `GraphCheck.bound`.
    """
    sizes = {key: float(logits.abs().max()) for key, logits in expected.items()}
    return ENGINE_FACTOR * base_error * max(1.0, sizes[name] / sizes[None])


@pytest.mark.parametrize("engine", ENGINES)
def test_every_adapter_gives_pefts_logits_in_one_session(engine: str, web: Web, scripts: Path) -> None:
    order = (None, "first", "second", "late", "first", None)
    run = WebRun("web", [FEEDS[feed] for feed in FED], [ADAPTERS[name] for name in order])
    for feed, found in zip(FED, ENGINES[engine](scripts, run), strict=True):
        assert torch.equal(found[0], found[-1]), "the base model after adapters"
        assert torch.equal(found[1], found[-2]), "an adapter after others"
        expected, exact = web.logits(feed), web.logits(feed, double=True)
        errors = worst_errors(expected, dict(zip(order, found, strict=True)))
        noise = float((expected[None] - exact[None]).abs().max())
        assert errors[None] <= 2 * ENGINE_FACTOR * noise, "onnxruntime-web's noise is about twice ONNX Runtime's"
        for name in web.models:
            bound = allowed(errors[None], expected, name)
            assert errors[name] <= bound, (feed, name)
            effect = float((expected[name] - expected[None]).abs().max())
            assert effect > 1000 * bound, "an adapter that does nothing would pass"
            wrong = float((found[order.index("late" if name == "first" else "first")] - expected[name]).abs().max())
            assert wrong > 1000 * bound, "an adapter in place of another would pass"


def test_a_classifier_swaps_adapters(web: Web, scripts: Path) -> None:
    """A graph of torch's exporter, without a cache."""
    root = web.root / "bert"
    tiny_bert(num_labels=3).save_pretrained(root / "base")
    save_tokenizer(root / "base")
    module = "bert.encoder.layer.1.attention.output.dense"
    a, b = torch.randn(2, 32), torch.randn(32, 2)
    config = {"task_type": "SEQ_CLS", "base_model_name_or_path": str(root / "base"), "target_modules": [module]}
    adapter = write_adapter(root / "adapter", {module: (a, b)}, **config)
    exported("BERT", adapter, root / "web", *WEB)
    adapters = [None, "bert/web/adapter.safetensors"]
    feed, model = FEEDS["batch"], AutoModelForSequenceClassification.from_pretrained(root / "base").eval()
    (found,) = in_node(scripts, WebRun("bert/web", [feed], adapters, head_size=None))
    with torch.no_grad():
        expected = [model(input_ids=feed.ids, attention_mask=feed.mask).logits]
        model.get_submodule(module).weight += 2 * b @ a  # alpha is 2 r
        expected.append(model(input_ids=feed.ids, attention_mask=feed.mask).logits)
    assert float((expected[1] - expected[0]).abs().max()) > 1e-3
    for logits, right in zip(found, expected, strict=True):
        torch.testing.assert_close(logits, right, rtol=0, atol=1e-5 * float(right.abs().max()))


@pytest.mark.matrix
def test_both_graphs_of_t5_get_files(tmp_path: Path) -> None:
    """The export runs them in ONNX Runtime, with inputs that are as required there as in onnxruntime-web."""
    tiny_t5().save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    matrices = {"decoder.block.0.layer.0.SelfAttention.q": (torch.randn(2, 32), torch.randn(32, 2))}
    config: dict[str, Any] = {"task_type": "SEQ_2_SEQ_LM", "base_model_name_or_path": str(tmp_path / "base")}
    first = write_adapter(tmp_path / "first", matrices, target_modules=[*matrices], **config)
    module = "encoder.block.0.layer.1.DenseReluDense.wo"
    weight = dict(tiny_t5().named_modules())[module].weight
    both = matrices | {module: (torch.randn(2, weight.shape[1]), torch.randn(weight.shape[0], 2))}
    second = write_adapter(tmp_path / "second", both, target_modules=[*both], **config)
    exported("T5", [first, second], tmp_path / "web", *WEB)
    for name, ranks in (("first", {"encoder": 0, "decoder": 2}), ("second", {"encoder": 2, "decoder": 2})):
        for part, rank in ranks.items():
            tensors = load_file(tmp_path / "web" / f"{name}.{part}.safetensors")
            assert [min(tensor.shape) for tensor in tensors.values()] == [rank, rank]


# The example


def node(scripts: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    words = [command("node"), "node.js", *map(str, arguments)]
    return subprocess.run(words, cwd=scripts, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("fp16", marks=pytest.mark.matrix)])
def test_the_example_decodes_with_each_adapter(precision: str, web: Web, scripts: Path, tmp_path: Path) -> None:
    graph = web.graph
    if precision == "fp16":
        graph = tmp_path / "fp16"
        assert export([web.root / "first", web.root / "second"], graph, *WEB, "--precision", "fp16") == 0
    prompt = FEEDS["one row"].ids
    files = [graph / "first.safetensors", graph / "second.safetensors"]
    done = node(scripts, graph, ",".join(map(str, prompt[0].tolist())), *files)
    assert done.returncode == 0, done.stderr
    lines = dict(line.rsplit(": ", 1) for line in done.stdout.splitlines())
    for file in files:
        tokens = [int(token) for token in lines[str(file)].split(",")]
        check_greedy(web.models[file.stem], prompt, tokens, gap=0.01 if precision == "fp16" else 1e-4)
    assert len(set(lines.values())) == 3


@torch.no_grad()
def check_greedy(model: Any, prompt: Tensor, tokens: Sequence[int], gap: float) -> None:
    """Each token is PyTorch's best after those before it, or as good but for rounding."""
    assert len(tokens) == 8
    ids = torch.cat([prompt, torch.tensor([tokens])], dim=1)
    logits = model(input_ids=ids).logits[0, prompt.shape[1] - 1 : -1]
    chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    assert bool((logits.amax(-1) - chosen <= gap).all())


def test_the_page_decodes_with_each_adapter(web: Web, scripts: Path) -> None:
    prompt = FEEDS["one row"].ids
    fields = {"folder": "/web", "tokens": ",".join(map(str, prompt[0].tolist()))}
    files = ["", "/web/first.safetensors", "/web/second.safetensors", "/web/absent.safetensors", "/web/model.onnx", ""]
    lines = ask_chromium(scripts, "in_page.html", [fields | {"adapter": file} for file in files])
    assert lines[0] == lines[-1]
    for line, name in zip(lines[1:3], ("first", "second"), strict=True):
        shown, tokens = line.split(": ")
        assert shown == f"/web/{name}.safetensors"
        check_greedy(web.models[name], prompt, [int(token) for token in tokens.split(",")], gap=1e-4)
    assert lines[3] == "error: /web/absent.safetensors: the server answers 404"
    assert lines[4].startswith("error: /web/model.onnx is not a complete safetensors file")


INPUT = "model.layers.0.attn.q_proj.lora_A.MatMul.weight"


def changed(change: Callable[[dict[str, Tensor]], object], **metadata: str) -> Callable[[Path, Path], None]:
    """Rewrite an adapter's file with other tensors, or other metadata."""

    def damage(file: Path, base: Path) -> None:
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"base_model": str(base), **metadata})

    return damage


WRONG: dict[str, tuple[Callable[[Path, Path], object], tuple[str, ...]]] = {
    "another base model": (changed(dict.copy, base_model="another"), ("is for another, not for", "--graph")),
    "a missing input": (changed(lambda tensors: tensors.pop(INPUT)), (f"has no {INPUT}", "--graph")),
    "another width": (changed(lambda tensors: tensors.update({INPUT: torch.ones(63, 4)})), (INPUT, "[63,4]", "64")),
    "another type": (changed(lambda tensors: tensors.update({INPUT: torch.ones(64, 4).half()})), (INPUT, "float16")),
    "cut off": (lambda file, _: file.write_bytes(file.read_bytes()[:20000]), ("not a complete safetensors file",)),
}


def test_a_wrong_adapter_is_named(web: Web, scripts: Path) -> None:
    folder = web.root / "wrong"
    folder.mkdir()
    for case in ("right", *WRONG):
        shutil.copy(web.graph / "first.safetensors", folder / case)
        if case in WRONG:
            WRONG[case][0](folder / case, web.root / "base")
    files = [f"wrong/{case}" for case in ("right", *WRONG)]
    right, *answers = ask_node(scripts, "refusals", {"folder": "web", "graph": "model.onnx", "adapters": files})
    assert right is None
    for file, message, (_, words) in zip(files[1:], answers, WRONG.values(), strict=True):
        assert message.startswith(f"{file} ")
        assert all(word in message for word in words), message


def test_the_example_ends_with_a_message(web: Web, scripts: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.safetensors"
    file.write_bytes((web.graph / "first.safetensors").read_bytes()[:20000])
    done = node(scripts, web.graph, "1,5", file)
    assert done.returncode == 2
    assert done.stderr.startswith("error: mine.safetensors is not a complete safetensors file"), done.stderr
    native = shutil.copytree(web.graph, tmp_path / "graph")
    edit_json(native / "swappable.json", lambda layout: layout.update(web=False))
    done = node(scripts, native, "1,5")
    assert (done.returncode, "without --web" in done.stderr) == (2, True)


def test_the_example_pins_onnxruntime_web() -> None:
    package = json.loads((Path(__file__).parents[2] / "docs/examples/web/package.json").read_text())
    assert package["dependencies"] == {"onnxruntime-web": "1.30.0"}
