"""A tiny model and its adapter, adapters with planted faults, and a server that answers as any of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from loraover.adapters.prompts import read_prompts
from loraover.checkpoint.source import read_source
from loraover.common.reporter import SILENT
from loraover.models.load import ModelSource, load_model, resolve_model
from loraover_serve.comparison.rounding import FORMATS
from loraover_serve.engines.base import Setting
from loraover_serve.judge.models import Answers
from loraover_serve.judge.names import LEFT_OUT, NOT_APPLIED, PERMUTED, ROUNDED, SCALED, TRANSPOSED
from loraover_serve.verify.by_pytorch import judge_answers, make_setting, make_subject
from loraover_serve.verify.pytorch import TorchModels, make_models
from loraover_serve.verify.report import EngineResult
from loraover_serve.verify.request import VerifyRequest

from support.make_checkpoint import LINEAR
from support.plain_adapter import tiny_decoder
from support.tiny_hub import tiny_tokenizer
from support.tiny_models import fill_b

Tensors = dict[str, Tensor]
NEW_TOKENS = 4
BASE_OPTIONS: dict[str, Any] = {"vocab_size": 72}
"""More tokens than any layer has rows, which onnxruntime-genai's builder asks for."""


def save_base(
    folder: Path,
    seed: int = 0,
    change: Callable[[Tensor], Tensor] = lambda weight: weight,
    *,
    chat: bool = False,
    **options: Any,
) -> Path:
    """A tiny Llama with a tokenizer, with a chat template if asked; `options` are fields of its configuration."""
    model = tiny_decoder("Llama", seed, **(BASE_OPTIONS | options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(change(parameter))
    model.save_pretrained(folder)
    tiny_tokenizer(chat=chat).save_pretrained(folder)
    return folder


def save_adapter(folder: Path, base: Path, seed: int = 2, **lora: Any) -> Path:
    """An rsLoRA of two ranks and two alphas on all linear layers, unless told otherwise; returns `folder`."""
    options = {
        "r": 4,
        "lora_alpha": 6,
        "use_rslora": True,
        "rank_pattern": {"q_proj": 6},
        "alpha_pattern": {"v_proj": 3},
        "target_modules": "all-linear",
        "task_type": "CAUSAL_LM",
    } | lora
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**options))
    fill_b(model, seed=seed)
    model.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Case:
    """An adapter, its base model, and what PyTorch answers to questions."""

    base: Path
    adapter: Path
    models: TorchModels

    def setting(self, scratch: Path, *, adapter: Path | None = None, base: Path | None = None, **asked: Any) -> Setting:
        """What an engine is started with: another adapter or base model than the judge's is a planted fault."""
        request = VerifyRequest(adapter or self.adapter, **asked)
        return make_setting(request, resolve_model(str(base or self.base)), scratch, longest=96)


def make_case(
    base: Path, adapter: Path, new_tokens: int = NEW_TOKENS, asked: Sequence[tuple[int, ...]] | None = None
) -> Case:
    """A case with these prompts, or the beginnings of the built-in ones."""
    source, model = read_source(adapter), resolve_model(str(base))
    subject = make_subject(source, model)
    models = make_models(source, model, asked or prompts(model), new_tokens, "cpu", SILENT, subject=subject)
    return Case(base, adapter, models)


def judged(answers: Answers, models: TorchModels, served_format: str = "bf16") -> EngineResult:
    """The judge's result on answers of an engine."""
    return EngineResult(seconds=0.0, **judge_answers("an engine", answers, models, served_format))


def prompts(model: ModelSource) -> list[tuple[int, ...]]:
    """The beginnings of the built-in prompts."""
    return [tuple(ids[0, :24].tolist()) for ids in read_prompts(model).batches]


@dataclass(frozen=True)
class Planted:
    """A fault in the files of an adapter."""

    fault: str
    words: str
    config: Mapping[str, Any]
    change: Callable[[Tensors], Tensors] = lambda tensors: tensors


def _each(change: Callable[[Tensor], Tensor], part: str = "") -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: change(t) if part in key else t for key, t in tensors.items()}


def _transposed(tensors: Tensors) -> Tensors:
    turned = dict(tensors)
    for key, a in tensors.items():
        if "lora_A" in key and key.split(".")[-3] in ("q_proj", "o_proj"):  # the square ones
            twin = key.replace("lora_A", "lora_B")
            turned[key], turned[twin] = tensors[twin].mT.contiguous(), a.mT.contiguous()
    return turned


def _unpermuted(tensors: Tensors) -> Tensors:
    """What B of q_proj and k_proj amounts to without llama.cpp's permutation: here, heads have 32 rows."""

    def undo(b: Tensor) -> Tensor:
        return b.reshape(-1, 16, 2, b.shape[1]).swapaxes(1, 2).reshape(b.shape).contiguous()

    return {key: undo(t) if key.endswith(QUERY_AND_KEY) else t for key, t in tensors.items()}


QUERY_AND_KEY = ("q_proj.lora_B.weight", "k_proj.lora_B.weight")
SCALING_ONE = {"use_rslora": False, "lora_alpha": 4, "alpha_pattern": {"q_proj": 6}}
FAULTS = {
    "scaling dropped": Planted(SCALED, "the scaling is left out", SCALING_ONE),
    "rsLoRA ignored": Planted(SCALED, "use_rslora is ignored", {"use_rslora": False}),
    "alpha_pattern ignored": Planted(SCALED, "alpha_pattern is ignored", {"alpha_pattern": {}}),
    "a tenth more": Planted(SCALED, "every delta_W is multiplied by 1.1", {}, _each(lambda b: 1.1 * b, "lora_B")),
    "not loaded": Planted(NOT_APPLIED, "the adapter is not loaded", {}, _each(torch.zeros_like, "lora_B")),
    "transposed": Planted(TRANSPOSED, "delta_W of every square module", {}, _transposed),
    "permutation dropped": Planted(PERMUTED, "B of q_proj and k_proj lack the row order", {}, _unpermuted),
    "v_proj missing": Planted(LEFT_OUT, "v_proj is not adapted", {}, _each(torch.zeros_like, "v_proj.lora_B")),
    "MLP missing": Planted(LEFT_OUT, "only attention is adapted", {}, _each(torch.zeros_like, "mlp")),
    "int8": Planted(ROUNDED, "A and B are rounded to int8", {}, _each(FORMATS["int8"].weights)),
    "bf16": Planted(ROUNDED, "A and B are rounded to bf16", {}, _each(FORMATS["bf16"].weights)),
}


WRONG_PREFIX = Planted(
    NOT_APPLIED,
    "the adapter is not loaded",
    {"target_modules": LINEAR},
    lambda tensors: {key.replace("model.layers", "layers"): t for key, t in tensors.items()},
)
"""Names that PEFT's form allows and the base model does not have; our exports refuse them."""


def plant(planted: Planted, adapter: Path, folder: Path) -> Path:
    """A copy of an adapter with a fault; returns `folder`."""
    shutil.copytree(adapter, folder)
    file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    save_file(planted.change(load_file(file)), file, metadata={"format": "pt"})
    config.write_text(json.dumps(json.loads(config.read_text()) | planted.config))
    return folder


class Float8Cache(DynamicCache):
    """Keys and values in float8 with 4 bits of exponent, without a scale, as vLLM's --kv-cache-dtype fp8 holds them."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = super().update(*map(self.held, (key_states, value_states)), *args, **kwargs)
        return found

    @staticmethod
    def held(x: Tensor) -> Tensor:
        return x.to(torch.float8_e4m3fn).to(x.dtype)


class CutCache(Float8Cache):
    """The same without rounding: what float8 does not hold is cut off, as vLLM 0.32 for CPU does."""

    @staticmethod
    def held(x: Tensor) -> Tensor:
        _, exponent = torch.frexp(x)  # x is from 1/2 to 1 times 2 ** exponent
        lowest = torch.clamp(exponent - 4, min=-9)  # exponent of the last of 4 bits; -9 for subnormal numbers
        return torch.ldexp(torch.trunc(torch.ldexp(x, -lowest)), lowest)


class Served:
    """What a fake OpenAI server answers, from models in this process.

    Args:
        base: Folder of the base model.
        adapters: Folder of an adapter, or None for the base model, by the name that requests use.
        form: How logprobs name tokens: "ids" as vLLM does, "content" as llama.cpp does, or "texts".
        cache: What holds keys and values.
    """

    def __init__(
        self,
        base: Path,
        adapters: Mapping[str, Path | None],
        form: str = "ids",
        *,
        cache: type[DynamicCache] = DynamicCache,
    ) -> None:
        self._cache = cache
        self._models = {name: self._load(base, path) for name, path in adapters.items()}
        self._computed: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self._form = form

    @staticmethod
    def _load(base: Path, adapter: Path | None) -> Any:
        model = load_model(resolve_model(str(base)))
        return (model if adapter is None else PeftModel.from_pretrained(model, adapter)).eval()

    def __call__(self, body: dict[str, Any]) -> int | bytes:
        return 404 if body["model"] not in self._models else json.dumps(self.answer(body)).encode()

    def prompt(self, body: dict[str, Any]) -> list[int]:
        """Tokens of a request, which has them, a text or messages."""
        if "messages" in body:
            text = self.tokenizer.apply_chat_template(body["messages"], tokenize=False, add_generation_prompt=True)
            return list(self.tokenizer(text, add_special_tokens=False).input_ids)
        given = body["prompt"]
        return list(self.tokenizer(given).input_ids if isinstance(given, str) else given)

    @torch.inference_mode()
    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        ids, tops = self.prompt(body), []
        if body.get("all_logits"):
            return {"logits": self._logits(body, ids)}
        for _ in range(body["max_tokens"]):
            logprobs = self._logits(body, ids)[-1].log_softmax(-1)
            tops.append(logprobs.topk(body["top_logprobs" if "messages" in body else "logprobs"]))
            ids.append(int(logprobs.argmax()))
        choice = {"index": 0, "text": "", "logprobs": self._logprobs(tops)}
        return {"model": body["model"], "choices": [choice]}

    def _logits(self, body: dict[str, Any], ids: list[int]) -> Tensor:
        """Logits after each token, with the request's temperature and with Hugging Face's repetition penalty."""
        asked = body["model"], tuple(ids)
        if asked not in self._computed:  # a verification asks the same again, alone and in company
            model = self._models[body["model"]]
            self._computed[asked] = model(torch.tensor([ids]), past_key_values=self._cache()).logits[0]
        logits = self._computed[asked]
        penalty = body.get("repetition_penalty", 1.0)
        read = torch.zeros(len(ids), logits.shape[-1], dtype=torch.bool)
        for place, token in enumerate(ids):
            read[place:, token] = True
        logits = torch.where(read, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
        return logits / (body.get("temperature") or 1.0)

    def _logprobs(self, tops: list[Any]) -> dict[str, Any]:
        pairs = [list(zip(top.indices.tolist(), top.values.tolist(), strict=True)) for top in tops]
        if self._form == "content":
            return {
                "content": [
                    {"id": first[0][0], "top_logprobs": [{"id": i, "logprob": v} for i, v in first]} for first in pairs
                ]
            }
        name = (lambda i: f"token_id:{i}") if self._form == "ids" else self.tokenizer.convert_ids_to_tokens
        return {
            "tokens": [name(first[0][0]) for first in pairs],
            "top_logprobs": [{name(i): value for i, value in first} for first in pairs],
        }
