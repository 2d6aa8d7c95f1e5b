"""Tiny models of vectors and classes with adapters, and servers that answer for them by HTTP, right or with a fault.

PEFT runs the adapter; pooling, lengths and probabilities are computed here in NumPy, in float64, from the last hidden
states or the logits.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer

from loraover.models.load import load_model, resolve_model

from support.http_server import Handler, serving
from support.tiny_hub import tiny_tokenizer
from support.tiny_models import fill_b, tiny_bert, tiny_llama

Row = NDArray[np.float64]
BASE, SHOP = "base", "shop"

POOLED: dict[str, Callable[[Row], Row]] = {
    "last": lambda hidden: hidden[-1],
    "cls": lambda hidden: hidden[0],
    "mean": lambda hidden: hidden.mean(axis=0),
    "max": lambda hidden: hidden.max(axis=0),
}
CLASSES = {
    "FEATURE_EXTRACTION": "AutoModel",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
}


def save_encoder(folder: Path, task: str, labels: Sequence[str] = (), *, decoder: bool = True) -> Path:
    """Save a tiny Llama or BERT for a task, with a head for the labels, in `folder/base`; return that folder."""
    whole: Any = tiny_llama(max_position_embeddings=256) if decoder else tiny_bert()
    config = whole.config
    config.max_position_embeddings = 256
    if labels:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: index for index, label in enumerate(labels)}
        config.problem_type = "single_label_classification" if len(labels) > 1 else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = getattr(transformers, CLASSES[task]).from_config(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.15)  # of a size at which inputs matter
    model.eval().save_pretrained(folder / "base")
    tiny_tokenizer(adds="$A </s>" if decoder else "<s> $A </s>").save_pretrained(folder / "base")
    return folder / "base"


def save_vector_adapter(
    base: Path, folder: Path, task: str, seed: int = 1, size: float = 0.1, auto: str | None = None, **options: Any
) -> Path:
    """Save a LoRA of a model's task to a new folder, trained on a class of transformers; return the folder."""
    model = getattr(transformers, auto or CLASSES[task]).from_pretrained(base)
    config = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": task} | options
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = get_peft_model(model, LoraConfig(**config))
        fill_b(adapted, seed)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(10 * size)
                if "modules_to_save" in name:
                    parameter.add_(0.3 * torch.randn(parameter.shape))
    adapted.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Serve:
    """How a server answers; without fields as trained.

    Args:
        pooling: Pooling of vectors.
        normalised: Whether vectors get the length 1.
        prefix: Text before each input.
        longest: Number of tokens after which inputs are cut off; None cuts none.
        special: Whether special tokens are added.
        dimensions: Number of the first components that are left; None leaves all.
        arms: Model that answers for each name.
        factor: Factor on what the adapter changes in its weights.
        noise: Size of a relative error of each number, drawn by chance.
        order: Place of each class.
        names: Names of the classes; None leaves them out.
        raw: Whether logits come in place of probabilities.
        change: Function of the last answer, before it is sent.
        encoded: Function of a vector that is sent in base64.
        leaks: Whether a request for the base model that follows one for the adapter is answered by the adapter.
    """

    pooling: str = "last"
    normalised: bool = True
    prefix: str = ""
    longest: int | None = None
    special: bool = True
    dimensions: int | None = None
    arms: dict[str, str] = field(default_factory=lambda: {BASE: BASE, SHOP: SHOP})
    factor: float = 1.0
    noise: float = 0.0
    order: tuple[int, ...] = ()
    names: tuple[str, ...] | None = None
    raw: bool = True
    change: Callable[[Any], Any] = lambda answer: answer
    encoded: Callable[[Row], Row] = lambda row: row
    leaks: bool = False


class Service:
    """The models of a server, by PEFT.

    Args:
        base: Folder of the base model.
        adapter: Folder of the adapter.
        task: Its task.
    """

    def __init__(self, base: Path, adapter: Path, task: str) -> None:
        self.base, self.adapter, self.task = base, adapter, task
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self._models, self._lock = dict[Any, Any](), Lock()
        self._kept: dict[Any, Row] = {}

    def model(self, arm: str, factor: float = 1.0) -> Any:
        """The base model, or the adapted one with a factor on every delta_W."""
        with self._lock:  # a thread that waits finds the model there
            if (arm, factor) not in self._models:
                model = load_model(resolve_model(str(self.base)), auto_class=CLASSES[self.task])
                if arm == SHOP:
                    model = PeftModel.from_pretrained(model, str(self.adapter))
                    for name, parameter in model.named_parameters():
                        if "lora_B" in name:
                            parameter.data.mul_(factor)
                self._models[arm, factor] = model.eval()
            return self._models[arm, factor]

    @torch.inference_mode()
    def rows(self, arm: str, texts: tuple[str, ...], serve: Serve) -> Row:
        """Hidden states of each token, or logits."""
        factor = serve.factor if arm == SHOP else 1.0
        key = arm, factor, texts, serve.longest, serve.special
        if key not in self._kept:
            ids = self.tokenizer(
                *texts,
                return_tensors="pt",
                truncation=True,
                max_length=serve.longest or 256,
                add_special_tokens=serve.special,
            )
            found = self.model(arm, factor)(**ids)
            states = found.last_hidden_state if self.task == "FEATURE_EXTRACTION" else found.logits
            self._kept[key] = states[0].double().numpy()
        return self._kept[key]

    def answer(self, name: str, texts: Sequence[str], serve: Serve) -> Row:
        """Answer of a server to a text or a pair."""
        first, *others = texts
        found = self.rows(serve.arms[name], (serve.prefix + first, *others), serve)
        if self.task != "FEATURE_EXTRACTION":
            found = found[..., list(serve.order)] if serve.order else found
            if serve.raw:
                return found
            if found.shape[-1] == 1:
                return np.asarray(1 / (1 + np.exp(-found)))
            powers = np.exp(found - found.max(axis=-1, keepdims=True))
            return np.asarray(powers / powers.sum(axis=-1, keepdims=True))
        row = POOLED[serve.pooling](found)[: serve.dimensions]
        return row / np.linalg.norm(row) if serve.normalised else row


@dataclass
class Asked:
    """A running server, with the path and body of each request, and the model that was asked last."""

    url: str
    requests: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    last: str = BASE


@contextmanager
def vector_server(
    service: Service, serve: Serve | None = None, protocol: str = "vllm", below: str = "", absent: int = 404
) -> Iterator[Asked]:
    """Answer as vLLM, TEI or Infinity do, during a block.

    Args:
        protocol: vllm, tei or infinity.
        below: Beginning of every path.
        absent: HTTP status of the answer at any other path.
    """
    served, draw = serve or Serve(), np.random.default_rng(5)
    paths = {"vllm": _of_vllm, "tei": _of_tei, "infinity": _of_infinity}[protocol](service, served, draw)

    class Speaker(Handler):
        def do_GET(self) -> None:
            listed = {"data": [{"id": name, "parent": None if name == BASE else BASE} for name in served.arms]}
            known = self.path == "/v1/models" and protocol != "tei"
            self.answer(200 if known else 404, json.dumps(listed).encode())

        def do_POST(self) -> None:
            body = json.loads(self.body())
            asked.requests.append((self.path, body))
            answer = paths.get(self.path.removeprefix(below)) if self.path.startswith(below) else None
            if answer is None:
                self.answer(absent, b"{}", {"Content-Type": "application/json"})
                return
            if body.get("model", BASE) not in served.arms:
                self.answer(404, b"{}")
                return
            name = body.get("model", BASE)
            before, asked.last = asked.last, name
            if served.leaks and before == SHOP and name == BASE:
                body = body | {"model": SHOP}
            try:
                found = answer(body)
                own = "served/by-tei" if protocol == "tei" else name  # TEI names its own model, whatever is asked for
                found = found | {"model": own} if isinstance(found, dict) else found
            except (KeyError, TypeError):  # a field that this server needs, or one that it does not take
                self.answer(422, b"{}")
                return
            self.answer(200, json.dumps(served.change(found)).encode(), {"Content-Type": "application/json"})

    with serving(Speaker) as url:
        asked = Asked(url)
        yield asked


Paths = dict[str, Callable[[dict[str, Any]], Any]]


def _row(service: Service, serve: Serve, draw: Any, model: str, texts: Sequence[str]) -> Row:
    found = service.answer(model, texts, serve)
    size = np.sqrt(np.mean(np.square(found)))
    return np.asarray(found + serve.noise * size * draw.standard_normal(found.shape))


def _of_vllm(service: Service, serve: Serve, draw: Any) -> Paths:
    row = partial(_row, service, serve, draw)

    def embeddings(body: dict[str, Any]) -> Any:
        (text,) = body["input"]
        found: Any = row(body["model"], [text])
        is_text = body.get("encoding_format") == "base64"
        found = base64.b64encode(serve.encoded(found).astype("<f4").tobytes()).decode() if is_text else found.tolist()
        return {"model": body["model"], "data": [{"index": 0, "embedding": found}]}

    def classify(body: dict[str, Any]) -> Any:
        (text,) = body["input"]
        found = row(body["model"], [text])
        label = None if serve.names is None else serve.names[int(found.argmax())]
        return {"model": body["model"], "data": [{"index": 0, "label": label, "probs": found.tolist()}]}

    def pooling(body: dict[str, Any]) -> Any:
        (text,) = body["input"]
        return {"model": body["model"], "data": [{"index": 0, "data": row(body["model"], [text]).tolist()}]}

    def score(body: dict[str, Any]) -> Any:
        (found,) = row(body["model"], [body["text_1"], body["text_2"]])
        return {"model": body["model"], "data": [{"index": 0, "score": found}]}

    if service.task == "FEATURE_EXTRACTION":
        return {"/v1/embeddings": embeddings, "/pooling": pooling}
    if service.task == "TOKEN_CLS":
        return {"/pooling": pooling}
    return {"/classify": classify, "/pooling": pooling, "/score": score}


def _of_tei(service: Service, serve: Serve, draw: Any) -> Paths:
    row = partial(_row, service, serve, draw, SHOP)  # one model, whatever is asked for

    def predict(body: dict[str, Any]) -> Any:
        scores = zip(serve.names or (), row([body["inputs"]]).tolist(), strict=True)
        return sorted(({"label": name, "score": one} for name, one in scores), key=lambda each: -each["score"])

    def rerank(body: dict[str, Any]) -> Any:
        return [{"index": 0, "score": row([body["query"], body["texts"][0]]).tolist()[0]}]

    def embed(body: dict[str, Any]) -> Any:
        served = replace(serve, normalised=body["normalize"])
        return [_row(service, served, draw, SHOP, [text]).tolist() for text in body["inputs"]]

    return {
        "/v1/embeddings": lambda body: {"data": [{"index": 0, "embedding": row(body["input"]).tolist()}]},
        "/embed": embed,
        "/predict": predict,
        "/rerank": rerank,
    }


def _of_infinity(service: Service, serve: Serve, draw: Any) -> Paths:
    row = partial(_row, service, serve, draw)

    def classify(body: dict[str, Any]) -> Any:
        scores = zip(serve.names or (), row(body["model"], body["input"]).tolist(), strict=True)
        found = sorted(({"label": name, "score": one} for name, one in scores), key=lambda each: -each["score"])
        return {"model": body["model"], "data": [found]}

    def rerank(body: dict[str, Any]) -> Any:
        found = row(body["model"], [body["query"], body["documents"][0]]).tolist()[0]
        return {"model": body["model"], "results": [{"index": 0, "relevance_score": found}]}

    def embeddings(body: dict[str, Any]) -> Any:
        return {"model": body["model"], "data": [{"index": 0, "embedding": row(body["model"], body["input"]).tolist()}]}

    return {"/embeddings": embeddings, "/classify": classify, "/rerank": rerank}


def noisy(serve: Serve, size: float) -> Serve:
    """The same server with an error of each number."""
    return replace(serve, noise=size)
