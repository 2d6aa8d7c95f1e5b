"""What `loraover check` says of random adapters, against what vLLM, ONNX Runtime and llama.cpp really do.

The truth is the function of the model that was trained, in PyTorch, before its files were saved and changed.
"""

from __future__ import annotations

import shlex
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import httpx2
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from loraover.common.command_line import run
from loraover.common.errors import EngineError
from loraover.overparam.sites import lora_layers
from loraover_export import check_adapter
from loraover_export.check.report import EngineCheck
from loraover_export.cli import cli
from loraover_export.formats.gguf.base import write_base
from loraover_export.formats.gguf.llamacpp import LlamaCppModel
from loraover_export.formats.onnx.kinds import decoder
from loraover_serve.vllm.client import VllmServer
from loraover_serve.vllm.server import VllmServerConfig

from support.builder_forks import ForkedBuilder
from support.engine_forms import TINY
from support.make_checkpoint import edit_json, edit_tensors
from support.onnx_export import LINEAR, tiny_base
from support.onnx_graph import Feed, Graph
from support.vllm_damage import CONFIG, TENSORS, config, name_all, renamed
from support.vllm_loading import ENABLE_LORA, load_adapter, serving_loader, unload_adapter

pytestmark = [pytest.mark.matrix, pytest.mark.engine]

FOLDERS, GROUPS = 200, 10
FEED = Feed(1)
ENDS = (4, 8, 12)
"""Lengths of the beginnings of the batch after which logprobs are compared."""
WRONG = 0.002
"""Share of the adapter's effect on the logprobs that no rounding explains."""
FAMILIES = ("Llama", "Qwen3")

Change = Callable[[Path], object]
Logprobs = Mapping[tuple[int, int], float]
"""Logprobs by the number of tokens before them, and the token."""


def lose(part: str) -> Change:
    def change(found: dict[str, Tensor]) -> None:
        for key in [key for key in found if part in key]:
            del found[key]

    return lambda folder: edit_tensors(folder / TENSORS, change)


def spoil(value: float) -> Change:
    return lambda folder: edit_tensors(folder / TENSORS, lambda found: found[min(found)].view(-1)[:1].fill_(value))


def stored(dtype: torch.dtype) -> Change:
    def change(found: dict[str, Tensor]) -> None:
        found |= {key: tensor.to(dtype) for key, tensor in found.items()}

    return lambda folder: edit_tensors(folder / TENSORS, change)


def add_layer(folder: Path) -> None:
    def change(found: dict[str, Tensor]) -> None:
        found |= {k.replace("layers.1.", "layers.9."): t.clone() for k, t in found.items() if "layers.1." in k}

    edit_tensors(folder / TENSORS, change)
    name_all(folder)


def without(name: str, default: object = ...) -> Change:
    """Remove a field, if PEFT's default is its value."""

    def change(content: dict[str, Any]) -> None:
        if default is ... or content[name] == default:
            del content[name]

    return lambda folder: edit_json(folder / CONFIG, change)


CHANGES: dict[str, Change] = {
    "a field of nobody": config(note="mine", unsloth_fixed=True),
    "Megatron": config(megatron_config={"hidden_size": 64}),
    "tied matrices": config(ensure_weight_tying=True),
    "no alpha": without("lora_alpha", 8),
    "no rank": without("r", 8),
    "no version": without("peft_version"),
    "no task": config(task_type=None),
    "null start": config(init_lora_weights=None),
    "LoRA-GA": config(init_lora_weights="lora_ga"),
    "CorDA": config(init_lora_weights="corda"),
    "an unknown start": config(init_lora_weights="bogus"),
    "NaN": spoil(float("nan")),
    "infinity": spoil(float("inf")),
    "a lost layer": lose("layers.1."),
    "a lost module": lose("layers.0.self_attn.q_proj.lora_"),
    "a lost B": lose("layers.0.self_attn.q_proj.lora_B"),
    "no prefix": renamed("base_model.model.", ""),
    "a doubled prefix": renamed("base_model.model.", "base_model.model.base_model.model."),
    "another prefix": renamed("model.model.layers", "model.model.language_model.layers"),
    "an absent layer": add_layer,
    "bf16": stored(torch.bfloat16),
    "fp64": stored(torch.float64),
}


@dataclass
class Place:
    """A base model and what runs on it.

    Args:
        base: Folder of the base model.
        logprobs: Its logprobs, (tokens, vocabulary).
        server: vLLM's server of it, once it is needed.
        gguf: GGUF file of it, once it is needed.
    """

    base: Path
    logprobs: Tensor
    server: VllmServer | None = None
    gguf: Path | None = None


@dataclass(frozen=True)
class Truth:
    """An adapter, and the logprobs of the model that was trained."""

    folder: Path
    place: Place
    logprobs: Tensor
    drawn: str

    def verdict(self, found: Logprobs) -> str:
        """Judge an engine's answers: "right" or "wrong silently"."""
        effect = float((self.logprobs - self.place.logprobs).abs().max())
        worst = max(abs(value - float(self.logprobs[end - 1, token])) for (end, token), value in found.items())
        return "right" if worst <= WRONG * effect else "wrong silently"


@dataclass
class World:
    """Base models by family, made once, and stopped in the end."""

    folder: Path
    until: ExitStack
    places: dict[str, Place] = field(default_factory=dict)

    def place(self, family: str) -> Place:
        if family not in self.places:
            base = tiny_base(self.folder / family, family)
            self.places[family] = Place(base, logprobs_of(AutoModelForCausalLM.from_pretrained(base).eval()))
        return self.places[family]

    def vllm(self, place: Place) -> VllmServer:
        if place.server is None:
            options = VllmServerConfig(str(place.base), options=(*ENABLE_LORA, *TINY))
            place.server = self.until.enter_context(serving_loader(options, place.base.with_suffix(".log")))
        return place.server

    def gguf(self, place: Place) -> Path:
        if place.gguf is None:
            model = AutoModelForCausalLM.from_pretrained(place.base)
            place.gguf = write_base(model, place.base.with_suffix(".gguf"))
        return place.gguf


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with ExitStack() as until:
        yield World(tmp_path_factory.mktemp("truth"), until)


@torch.no_grad()
def logprobs_of(model: Any) -> Tensor:
    found: Tensor = model(input_ids=FEED.ids).logits[0].log_softmax(-1)
    return found


def draw(seed: int, place: Place, folder: Path) -> Truth:
    """Train an adapter in effect, by random numbers; save it as PEFT does, and change its files."""
    random = Random(seed)
    model: Any = None
    options: dict[str, Any] = {}
    while model is None:
        options = drawn_options(random)
        with suppress(ValueError), warnings.catch_warnings():  # PEFT refuses some combinations
            warnings.simplefilter("ignore")
            torch.manual_seed(seed)
            fresh = AutoModelForCausalLM.from_pretrained(place.base)
            model = get_peft_model(fresh, LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
        model.save_pretrained(folder)
    change = random.choice(list(CHANGES)) if random.random() < 0.6 else "no change"
    if change in CHANGES:
        CHANGES[change](folder)
    if change in ("LoRA-GA", "CorDA"):  # they were trained beside other weights, which nobody has any more
        for layer in lora_layers(model).values():
            layer.weight.data += 0.02 * torch.randn(layer.weight.shape)
    return Truth(folder, place, logprobs_of(model), f"{seed}: {options}, {change}")


def drawn_options(random: Random) -> dict[str, Any]:
    names = random.sample(LINEAR, random.randint(1, 4))
    often = random.random() < 0.5
    pool: dict[str, list[Any]] = {
        "use_rslora": [True],
        "rank_pattern": [{"q_proj": 6}, {r".*\.1\..*": 1}],
        "alpha_pattern": [{"q_proj": 7}, {r".*\.0\..*": 3}],
        "layers_to_transform": [[0], 1],
        "exclude_modules": [["layers.0.mlp.up_proj"]],
        "use_dora": [True],
        "lora_bias": [True],
        "bias": ["all"],
        "init_lora_weights": ["gaussian", "pissa", "olora", "orthogonal", "pissa_niter_2", False],
        "modules_to_save": [["lm_head"], ["norm"]],
        "trainable_token_indices": [FEED.ids[0, :3].tolist()],
        "alora_invocation_tokens": [FEED.ids[0, 2:3].tolist()],
        "target_modules": ["all-linear", rf".*\.({'|'.join(names)})", [*names, "embed_tokens"], [*names, "lm_head"]],
    }
    chosen = random.sample(list(pool), random.choice((0, 1, 1, 2)))
    fields = {"r": random.choice((1, 2, 4, 8)), "lora_alpha": random.choice((1, 4, 8)), "target_modules": names}
    return fields | {name: random.choice(pool[name]) for name in chosen if often or name != "use_dora"}


def peft_in_vllm(world: World, truth: Truth) -> str:
    return in_vllm(world, truth, truth.folder)


def in_vllm(world: World, truth: Truth, folder: Path) -> str:
    server = world.vllm(truth.place)
    found: dict[tuple[int, int], float] = {}
    try:
        load_adapter(server, folder.name, folder)
    except EngineError:
        return "refused"
    try:
        for end in ENDS:
            body = {"model": folder.name, "prompt": FEED.ids[0, :end].tolist(), "max_tokens": 1, "logprobs": 5}
            body |= {"temperature": 0, "return_tokens_as_token_ids": True}
            answer = httpx2.post(f"{server.url}/v1/completions", json=body, timeout=120)
            if answer.status_code != httpx2.codes.OK:  # numbers that JSON does not have
                return "wrong silently"
            top = answer.json()["choices"][0]["logprobs"]["top_logprobs"][0]
            found |= {(end, int(token.removeprefix("token_id:"))): value for token, value in top.items()}
    finally:
        unload_adapter(server, folder.name)
    return truth.verdict(found)


def peft_in_onnx(world: World, truth: Truth) -> str:
    """PEFT's folder, given to onnxruntime-genai's builder."""
    builder: Any = ForkedBuilder()
    graph = truth.folder.with_suffix(".graph")
    options: dict[str, Any] = {"precision": "fp32", "device": "cpu", "builder": builder}
    try:
        with builder:
            decoder.build_decoder(truth.place.base, graph, adapter=truth.folder, **options)
        return in_onnx(world, truth, graph)
    except Exception:  # whatever the builder or ONNX Runtime raises
        return "refused"


def in_onnx(world: World, truth: Truth, folder: Path) -> str:
    adapter = next(iter(folder.glob("*.onnx_adapter")), None)
    logits = Graph(folder / "model.onnx", adapter).logits(FEED).log_softmax(-1)
    return truth.verdict(everywhere(logits))


def everywhere(logprobs: Tensor) -> Logprobs:
    return {(end, token): float(logprobs[end - 1, token]) for end in ENDS for token in range(logprobs.shape[1])}


def in_llamacpp(world: World, truth: Truth, file: Path) -> str:
    with LlamaCppModel(world.gguf(truth.place), file, threads=1) as engine:
        logits = torch.from_numpy(engine.logits(FEED.ids[0].tolist()))
    return truth.verdict(everywhere(logits.log_softmax(-1)))


OUR_FORM = {"vllm": in_vllm, "onnx": in_onnx, "llamacpp": in_llamacpp}
"""What each engine does with what the exports write."""

PEFT_FORM = {"vllm": peft_in_vllm, "onnx": peft_in_onnx}
"""What each engine does with PEFT's folder; llama.cpp's converter is part of no package."""


def our_form(world: World, truth: Truth, check: EngineCheck) -> str:
    """Run the commands of the report, and the engine on what they write."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "BuilderProcess", ForkedBuilder)
        for command in check.commands.split(" && "):
            words = shlex.split(command)[2:]
            if words[0] == "vllm":
                words += ["--dtype", "fp32", "--no-convert"]
            if words[0] == "onnx":
                words += ["--no-check"]  # which compares logits itself, within narrower bounds
            if run(cli, words) != 0:
                return "refused"
    written = Path(words[words.index("-o") + 1])
    return OUR_FORM[check.engine](world, truth, written)


@pytest.mark.parametrize("group", range(GROUPS))
@pytest.mark.parametrize("engine", ["llamacpp", "onnx", "vllm"])
def test_check_says_what_the_engine_does(engine: str, group: int, world: World, tmp_path: Path) -> None:
    wrong, cells = [], 0
    for seed in range(group * FOLDERS // GROUPS, (group + 1) * FOLDERS // GROUPS):
        truth = draw(seed, world.place(FAMILIES[seed % len(FAMILIES)]), tmp_path / f"a{seed}")
        check = check_adapter(truth.folder, engines=engine).engines[0]
        pairs = {"ours": (check.by_us, our_form(world, truth, check))}
        if engine in PEFT_FORM:
            pairs["PEFT's"] = check.as_it_is, PEFT_FORM[engine](world, truth)
        cells += len(pairs)
        for form, (said, done) in pairs.items():
            if said.verdict != done:
                reasons = [f"{found.feature}: {found.found:.120}" for found in said.findings]
                wrong.append(f"{truth.drawn}; {form}: said {said.verdict}, was {done}; {reasons}")
    assert not wrong, f"{len(wrong)} of {cells} verdicts\n" + "\n".join(wrong)
