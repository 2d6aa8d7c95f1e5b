"""Count false alarms of the probes of caches and chat templates on real servers that are right.

    cd tests && ../.venv/bin/python -m benchmarks.false_alarms --work DIR prepare (then: record vllm-fp32; judge)

`record` starts a real engine with SmolLM2 and the adapter of `benchmarks.verify_noise`, asks it the long questions of
several beginnings cold and warm, and the recorded chats, and keeps its answers. `judge` resamples them: a beginning, as
many of its questions with replacement, and a sign for all that sets warm answers apart from cold ones; a beginning, and
answers of its warm rounds with replacement, as if given in churn; and chats with replacement, by their tokens or their
numbers alone, of which some are refused by chance. In further resamples, a stale cache is planted by PyTorch's
difference, to show what would be found.
"""

from __future__ import annotations

import copy
import gzip
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import click
import gguf

from loraover.checkpoint.source import read_source
from loraover.client.at_once import AT_ONCE
from loraover.client.endpoint import Endpoint
from loraover.client.speaker import Response
from loraover.common.errors import EngineError
from loraover.models.load import ModelSource, load_config, load_model, load_tokenizer, resolve_model
from loraover.reference import reference_model
from loraover_export import export_gguf
from loraover_export.formats.gguf.base import write_base
from loraover_serve.comparison.rounding import FORMATS
from loraover_serve.judge.asker import Asker
from loraover_serve.judge.caches import judge_warm
from loraover_serve.judge.churn import Meanwhile, judge_churn
from loraover_serve.judge.limits import ADAPTER, BASE
from loraover_serve.judge.models import Model, Row
from loraover_serve.judge.names import OF_EARLIER_WEIGHTS, STALE
from loraover_serve.judge.owners import Said
from loraover_serve.judge.reference import Reference
from loraover_serve.judge.results import Churn
from loraover_serve.judge.templates import Conversations, read_template
from loraover_serve.judge.warm_probe import Asked, WarmProbe
from loraover_serve.verify.chats import pack_chats
from loraover_serve.verify.long import long_prompts, packed_long, record_long
from loraover_serve.verify.recorder import QUESTIONS_FILE
from loraover_serve.verify.request import RecordRequest
from loraover_serve.verify.variants import Variants
from loraover_serve.vllm.server import VllmServerConfig

from benchmarks.verify_noise import MODEL, make_adapters, quantise
from support.gguf_export import rewrite
from support.real_data import data_folder
from support.real_servers import free_port, python_of, running
from support.vllm_loading import FEW_BLOCKS, load_adapter, serving_loader

BEGINNINGS, LINES = 3, 12  # beginnings of long questions, and the lines by which each is moved in the file of questions
ANSWERS = 60  # in a churn
REFUSED = 0.1  # share of the chats that a resample refuses
VLLM = ("--enforce-eager", "--enable-lora", "--max-model-len", "1024", "--enable-prompt-tokens-details", *FEW_BLOCKS)


def make_references(source: ModelSource, folder: Path) -> Iterator[dict[str, Any]]:
    """Contents of references of an adapter that have long questions alone, one for each beginning.

    The sensitivity is 1, the least that a recording finds, and with it the strictest judge.
    """
    lines, tokenizer = QUESTIONS_FILE.read_text(encoding="utf-8").splitlines(), load_tokenizer(source)
    request = RecordRequest(folder / ADAPTER, model=source.name, device="cpu", long=True, earlier=folder / "weak")
    adapter, earlier = read_source(folder / ADAPTER), read_source(folder / "weak")
    vocabulary = load_config(source).get_text_config().vocab_size
    plain = Variants(adapter, source, "cpu", [], loaded=load_model(source))
    for index in range(BEGINNINGS):
        asked = long_prompts(request, source, tokenizer, lines[index * LINES :] + lines[: index * LINES])
        with reference_model(plain.model, adapter) as adapted:
            recorded = record_long(request, adapted, plain, earlier, asked)
        packed = packed_long(recorded, tokenizer)
        yield {
            "schema_version": 1,
            "adapter": ADAPTER,
            "base_model": source.name,
            "ends": [],
            "sensitivity": 1.0,
            "vocabulary": vocabulary,
            "formats": {name: {"distance": 1.0, "strength": 1.0} for name in FORMATS},  # which no probe here reads
            **packed,
            "caches": packed,
            **pack_chats(tokenizer, vocabulary),
        }


@contextmanager
def in_vllm(dtype: str, source: ModelSource, folder: Path) -> Iterator[tuple[str, str, str | None]]:
    """The address of a vLLM, and the names of the adapter and of the base model there."""
    config = VllmServerConfig(source.location, options=("--dtype", dtype, *VLLM))
    with serving_loader(config, folder / f"vllm-{dtype}.log") as server:
        load_adapter(server, "shop", folder / ADAPTER)
        yield server.url, "shop", source.location


@contextmanager
def in_llama_server(form: str, source: ModelSource, folder: Path) -> Iterator[tuple[str, str, str | None]]:
    """The address of a llama-server with matrices in a format of GGUF, and the name of the adapter there.

    It has no prompt cache in the host's memory, which gives prompts of one model to another after other prompts.
    """
    exact, named, base, adapter = (folder / f"{name}.gguf" for name in ("exact", "named", form, ADAPTER))
    if not base.exists():
        write_base(load_model(source), exact)
        rewrite(exact, named, partial(_add_vocabulary, load_tokenizer(source)))
        quantise(named, base, form)
        export_gguf(folder / ADAPTER, adapter, model=source.name)
    port, script = free_port(), Path(__file__).parents[1] / "support" / "llama_server.py"
    words = [
        str(python_of("LORAOVER_LLAMA_SERVER", "llama-server")),
        str(script),
        str(base),
        str(port),
        str(adapter),
        "--cache-ram",
        "0",
    ]
    with running(words, port, "/health", folder / "llama.log", {}) as url:
        yield url, "0", None


def _add_vocabulary(tokenizer: Any, fields: dict[str, Any], _: object) -> None:
    """Give a GGUF file the tokens, merges and chat template of a tokenizer of bytes."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    kinds = gguf.TokenType
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    fields |= {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [int(kinds.CONTROL if i in special else kinds.NORMAL) for i in range(len(tokens))],
        "tokenizer.ggml.merges": [each if isinstance(each, str) else " ".join(each) for each in model["merges"]],
        "tokenizer.ggml.bos_token_id": tokenizer.bos_token_id,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": tokenizer.chat_template,
    }


ENGINES: dict[str, Callable[[ModelSource, Path], Any]] = {
    "vllm-fp32": partial(in_vllm, "float32"),
    "vllm-bf16": partial(in_vllm, "bfloat16"),
    "llama-server-bf16": partial(in_llama_server, "BF16"),
    "llama-server-q8": partial(in_llama_server, "Q8_0"),
}


class Recording(Endpoint):
    """A server whose answers are kept, by path and body."""

    kept: ClassVar[dict[str, Any]] = {}

    def request(self, path: str, body: dict[str, Any] | None = None, *, timeout_s: float | None = None) -> Any:
        key = json.dumps([path, body], sort_keys=True)
        try:
            self.kept[key] = super().request(path, body, timeout_s=timeout_s)
        except EngineError as error:
            self.kept[key] = {"refused": str(error)}
            raise
        return self.kept[key]


@click.group()
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Folder for adapters and answers.")
@click.pass_context
def main(context: click.Context, work: Path) -> None:
    """Record answers of right servers, and judge resamples of them."""
    work.mkdir(exist_ok=True, parents=True)
    context.obj = work.resolve()


@main.command()
@click.pass_obj
def prepare(work: Path) -> None:
    """Train the adapter, and record its references."""
    source = resolve_model(MODEL)
    if not (work / ADAPTER).exists():
        with gzip.open(data_folder() / "gsm8k" / "train.jsonl.gz", "rt", encoding="utf-8") as file:
            problems = [json.loads(line) for line in file]
        make_adapters(source, work, [f"{each['question']}\n{each['answer']}" for each in problems])
    (work / "references.json").write_text(json.dumps([*make_references(source, work)]))


@main.command()
@click.argument("engine", type=click.Choice(list(ENGINES)))
@click.pass_obj
def record(work: Path, engine: str) -> None:
    """Ask a real engine, and keep its answers."""
    contents = json.loads((work / "references.json").read_text())
    kept: list[Any] = []
    with ENGINES[engine](resolve_model(MODEL), work) as (url, name, base):
        endpoint = Recording(url)
        chats = Reference(contents[0]).conversations
        click.echo(f"{engine}: template: {read_template(endpoint, name, chats)}")
        template = {**endpoint.kept}
        for content in contents:
            reference = Reference(content)
            asker = Asker.of(reference, endpoint, name, base, "llama-server" if base is None else "openai")
            assert reference.caches is not None
            answers = WarmProbe(Asker(reference.caches, asker.speaker, asker.names, asker.find_other)).answers()
            found = judge_warm(reference.caches, *answers)
            click.echo(f"{engine}: {found.verdict}: {found.reason}")
            for each in found.warm:
                click.echo(f"  {each.arm} {each.after}: {each.apart.rms:.2g} nats, at most {each.apart.largest:.2g}")
            kept.append(answers)
            told = {"answers": kept, "name": name, "template": template}
            (work / f"{engine}.json").write_text(json.dumps(told))


class Replaying:
    """A server that answers as a real one has answered, or refuses by chance.

    Args:
        kept: Answers of the real one, by path and body.
        draw: Source of refusals.
        is_counting: Whether it tells the numbers of tokens alone.
    """

    GREEDY = Endpoint.GREEDY

    def __init__(self, kept: Mapping[str, Any], draw: random.Random, *, is_counting: bool) -> None:
        self._kept, self._draw, self._is_counting = kept, draw, is_counting

    def request(self, path: str, body: dict[str, Any]) -> Any:
        answer = self._kept.get(json.dumps([path, body], sort_keys=True), {"refused": "not asked"})
        if "refused" in answer or self._draw.random() < REFUSED:
            raise EngineError("refused")
        if self._is_counting:
            return {"usage": answer.get("usage")}
        return answer

    def hidden(self, text: str) -> str:
        return text


class Told:
    """Answers of a real server to the long questions of one beginning.

    Args:
        models: The long questions.
        kept: The answers, as `record` writes them.
    """

    def __init__(self, models: Reference, kept: Sequence[Any]) -> None:
        cold, noise, warm, self._hits = kept
        self._models, self._noise, self._warm = models, _asked(noise), [*map(_asked, warm)]
        self._cold = {arm: _asked(each) for arm, each in cold.items()}

    def drawn(self, draw: random.Random, fault: Model | None = None, of: str = "") -> Any:
        """The verdict on a resample, with a fault of an arm that is planted in its warm answers."""
        models, sign = copy.copy(self._models), draw.choice([-1, 1])
        questions = draw.choices(range(len(models.questions)), k=len(models.questions))
        places = [(slot, place) for slot, q in enumerate(questions) for place in self._places(q)]
        models.places = [(slot, self._models.places[place][1]) for slot, place in places]
        models.base, models.adapter = (_moved(model, places) for model in (models.base, models.adapter))
        models.variants = {arm: [_moved(each, places) for each in known] for arm, known in models.variants.items()}

        def moved(asked: Asked, shift: float, planted: Model | None = None) -> Asked:
            found = ((index, self._row(asked, place, shift, planted)) for index, (_, place) in enumerate(places))
            return asked._replace(rows={index: row for index, row in found if row})

        cold = {arm: moved(each, 1) for arm, each in self._cold.items()}
        warm = [moved(each, sign, fault if each.arm == of else None) for each in self._warm]
        return judge_warm(models, cold, moved(self._noise, sign), warm, self._hits)

    def churned(self, draw: random.Random) -> Churn:
        """The verdict on answers in churn, a third of the adapter's by its earlier version as PyTorch has it."""
        models, sign, said = self._models, draw.choice([-1, 1]), list[Said]()
        (earlier,) = (each for each in models.recorded(ADAPTER) if each.fault == STALE)
        for turn in range(ANSWERS):
            asked = draw.choice([each for each in (self._noise, *self._warm) if each.arm in self._cold])
            question = draw.randrange(len(models.questions))
            version = earlier if asked.arm == ADAPTER and draw.random() < 1 / 3 else None
            rows = {place: self._row(asked, place, sign, version) for place in self._places(question)}
            place, rows = models.first(question), {place: row for place, row in rows.items() if row}
            said.append(Said(asked.arm, place, rows, 0.1, Response(asked.arm, place, {"id": f"{turn}"}, True)))
        noise = self._noise.rows
        moved = self._noise._replace(rows={place: self._row(self._noise, place, sign) for place in noise})
        begun = Churn("inconclusive", "", None, 60.0, None, AT_ONCE)
        return judge_churn(begun, models, {arm: arm for arm in self._cold}, self._cold, moved, Meanwhile(said, {}))

    def _places(self, question: int) -> list[int]:
        return [place for place, (q, _) in enumerate(self._models.places) if q == question]

    def _row(self, asked: Asked, place: int, shift: float, planted: Model | None = None) -> Row:
        """An answer at a place, moved from the cold one, with a model's change; empty where there was none."""
        cold = self._cold[asked.arm].rows.get(place, {})
        row = {i: cold[i] + shift * (v - cold[i]) for i, v in asked.rows.get(place, {}).items() if i in cold}
        right = (self._models.base if asked.arm == BASE else self._models.adapter).rows[place]
        stale = {} if planted is None else planted.rows[place]
        return {i: v + stale[i] - right[i] if i in stale else v for i, v in row.items()}


def _asked(kept: Sequence[Any]) -> Asked:
    arm, after, rows, cached = kept
    return Asked(arm, after, {int(p): {int(i): v for i, v in row.items()} for p, row in rows.items()}, cached)


def _moved(model: Model, places: Sequence[tuple[int, int]]) -> Model:
    rows, floors = [model.rows[place] for _, place in places], [model.floors[place] for _, place in places]
    return Model(rows, floors, model.fault, model.detail, model.factor)


@main.command()
@click.option("--number", default=10_000, help="Resamples of each engine.")
@click.option("--planted", default=500, help="Resamples with each fault.")
@click.option(
    "--only", type=click.Choice(list(ENGINES)), multiple=True, help="Engine; by default all that are recorded."
)
@click.option("--seed", default=0, help="Seed of the draws.")
@click.pass_obj
def judge(work: Path, number: int, planted: int, only: Sequence[str], seed: int) -> None:
    """Resample recorded answers, and count the verdicts."""
    contents = json.loads((work / "references.json").read_text())
    references = [Reference(content) for content in contents]
    for engine in only or [name for name in ENGINES if (work / f"{name}.json").exists()]:
        kept, draw = json.loads((work / f"{engine}.json").read_text()), random.Random(seed)
        told = [Told(ref.caches, each) for ref, each in zip(references, kept["answers"], strict=False) if ref.caches]
        right = [draw.choice(told).drawn(draw) for _ in range(number)]
        noise = sorted(each.noise.rms for each in right)
        click.echo(
            f"{engine}: caches: {dict(Counter(each.verdict for each in right))} of {number}; noise {noise[0]:.2g} to "
            f"{noise[-1]:.2g} nats, half below {noise[number // 2]:.2g}"
        )
        churned = [draw.choice(told).churned(draw) for _ in range(number)]
        click.echo(f"  churn: {dict(Counter(each.verdict for each in churned))} of {number}")
        for found in (right, churned):
            for verdict in ("differs", "inconclusive"):
                reason = next((each.reason for each in found if each.verdict == verdict), None)
                click.echo(f"  the first that is {verdict}: {reason}") if reason else None
        for arm in (ADAPTER, BASE):
            for index, model in enumerate(references[0].caches.variants[arm] if references[0].caches else ()):
                if model.fault in OF_EARLIER_WEIGHTS:  # not of a cache
                    continue
                named = Counter[str]()
                for _ in range(planted):
                    k = draw.randrange(len(told))
                    caches = references[k].caches
                    assert caches is not None
                    seen = told[k].drawn(draw, caches.variants[arm][index], arm)
                    named[seen.fault or seen.verdict] += 1
                click.echo(f"  planted {model.fault}: {dict(named)} of {planted}")
        chats, readings = references[0].conversations, Counter[str]()
        for _ in range(number):
            mine = Conversations(draw.choices(chats.found, k=len(chats.found)), chats.pieces)
            server: Any = Replaying(kept["template"], draw, is_counting=draw.random() < 0.5)
            reading = read_template(server, kept["name"], mine)
            assert reading is not None
            known = "not compared" if reading.words.startswith("the chat template was not compared") else "right"
            readings["another" if reading.is_other else "unclear" if reading.is_unclear else known] += 1
        click.echo(f"  template: {dict(readings)} of {number}")


if __name__ == "__main__":
    main()
