"""Commands that messages name as a remedy: each is run on the case that caused its message, and mends it.

A new message with a command fails here until it has a row in `REMEDIES`, or, if the command is no remedy, in `FACTS`.
"""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from torch import Tensor

from loraover import OverParameterization
from loraover.cli import cli
from loraover.common.command_line import run
from loraover.common.errors import ConfigError

from support import merge_cases
from support.conversions import SOURCES, fill, make_base, make_source
from support.make_checkpoint import edit_tensors
from support.onnx_export import OTHER, UNEVEN, tiny_base, tiny_lora
from support.plain_adapter import make_adapter, write_adapter
from support.tiny_experts import EXPERTS, expert_lora, flip, tiny_moe
from support.tiny_llava import llava_of_transformers_4
from support.tiny_models import saved, tiny_llama
from support.verified import save_adapter, save_base
from support.vllm_command import leaks_in_mixed_batches, vllm_command
from support.vllm_stand_in import stand_in

PACKAGES = [Path(__file__).parents[1] / name for name in ("loraover", "export", "serve", "lab")]
NAMED = re.compile(
    r"loraover (?:train|eval|inspect|doctor|compare|study|recipes|check|record|verify|export \w+|serve \w+)"
    r"(?: (?:A|B|\.{3}|--mode \w+|--engine \w+))*"
)


@dataclass(frozen=True)
class Case:
    """What causes a message, and how its command is completed.

    Args:
        cause: The command that shows the message, or a function that does.
        rest: Words that complete the command of the message.
        again: The command that succeeds afterwards; None if nothing of ours follows.
        codes: Exit codes of the completed command that show that it did what the message promised.
    """

    cause: list[str] | Callable[[], object]
    rest: list[str]
    again: list[str] | None = None
    codes: tuple[int, ...] = (0,)


def words(*parts: object) -> list[str]:
    return [str(part) for part in parts]


def merged(name: str) -> Callable[[Path], Case]:
    def case(folder: Path) -> Case:
        adapter = merge_cases.save(name, folder).adapter
        return Case(words("export", "combine", adapter, "-o", folder / "sum"), words(adapter, "-o", folder / "merged"))

    return case


def trained_tokens(folder: Path) -> Case:
    adapter = make_source(make_base(folder / "base", "prime"), folder / "in", SOURCES["lora with trained tokens"])
    combine = words("export", "combine", "-o", folder / "sum")
    return Case([*combine, str(adapter)], words(adapter, "-o", folder / "lora"), [*combine, str(folder / "lora")])


def old_experts(folder: Path) -> Case:
    base = saved(tiny_moe(), folder / "base")
    expert_lora(base, folder / "in")
    flip(folder / "in", "0.18.1")
    shrink = words("export", "shrink", "--rank", 2, "-o", folder / "small")
    rest = words(folder / "in", "-o", folder / "lora")
    return Case([*shrink, str(folder / "in")], rest, [*shrink, str(folder / "lora")])


def stacked_experts(folder: Path) -> Case:
    case = old_experts(folder)
    up = words("serve", "up", folder / "in", "--vllm", stand_in(folder, "answers"))
    return Case(up, case.rest)


def other_targets(folder: Path) -> Case:
    base, onnx = tiny_base(folder / "base", "Llama"), words("export", "onnx", "--mode", "swappable", "--no-check")
    tiny_lora(base, folder / "a", **(UNEVEN | {"target_modules": ["q_proj"]}))
    tiny_lora(base, folder / "b", **OTHER)
    assert run(cli, [*onnx, str(folder / "a"), "-o", str(folder / "graph")]) == 0
    both = words(folder / "a", folder / "b", "-o", folder / "graphs", "--no-check")
    return Case([*onnx, *words(folder / "b", "-o", folder / "more", "--graph", folder / "graph")], both)


def unread_release(folder: Path) -> Case:
    command, base = vllm_command(), save_base(folder / "base")
    adapter, out = save_adapter(folder / "in", base), folder / "out"
    options = ["--vllm", str(command), "--", "--dtype", "float32", "--enforce-eager"]
    cause = words("export", "vllm", adapter, "-o", out, "--vllm-version", "99.0.0")
    return Case(cause, [str(out), *options], codes=(0, 1) if leaks_in_mixed_batches() else (0,))


def patterns(folder: Path) -> Case:
    adapter = make_adapter(folder, "Llama", rank_pattern={"q_proj": 6})
    up = words("serve", "up", "--vllm", stand_in(folder, "answers"))
    return Case([*up, str(adapter)], [])


def adalora(folder: Path) -> Case:
    config = AdaLoraConfig(init_r=2, target_r=1, total_step=10, target_modules=["q_proj"], task_type="CAUSAL_LM")
    tiny_llama().save_pretrained(folder / "base")
    model = tiny_llama()
    model.name_or_path = str(folder / "base")
    adapted = get_peft_model(model, config)
    fill(adapted, "ADALORA")
    adapted.save_pretrained(folder / "in")

    def train() -> None:
        OverParameterization(adapted)

    return Case(train, words(folder / "in", "-o", folder / "lora"))


def classifier(folder: Path) -> Case:
    adapter = merge_cases.save("saved classifier", folder).adapter
    return Case(
        words("serve", "parity", "--adapter", adapter, "--baseline", adapter, "--engine", "torch"),
        words(adapter, "-o", folder / "onnx"),
    )


def changed_rows(verb: str) -> Callable[[Path], Case]:
    def case(folder: Path) -> Case:
        adapter = make_adapter(folder, "Llama", target_modules=["embed_tokens", "q_proj"])
        key = "base_model.model.model.embed_tokens.base_layer.weight"
        edit_tensors(adapter / "adapter_model.safetensors", lambda found: found.update({key: found[key] + 1}))
        return Case(words("export", verb, adapter, "-o", folder / "out"), words(adapter, "-o", folder / "merged"))

    return case


def another_kind(name: str, verb: str, *options: str, cause: tuple[str, ...] = ()) -> Callable[[Path], Case]:
    """An adapter of another kind, which a command refuses."""

    def case(folder: Path) -> Case:
        adapter = make_source(make_base(folder / "base", "even"), folder / "in", SOURCES[name])
        output = [] if verb == "check" else ["-o", folder / "out"]
        engine = ["--engine", "llamacpp"] if verb == "check" else []
        command = words("export", verb, adapter, *output, *engine, *cause)
        return Case(command, words(adapter, "-o", folder / "lora", *options))

    return case


def another_prefix(folder: Path) -> Case:
    adapter = make_adapter(folder, "Llama", target_modules=["q_proj"])

    def rename(tensors: dict[str, Tensor]) -> None:
        for key in list(tensors):
            tensors[key.replace("model.model.model", "model.model")] = tensors.pop(key)

    edit_tensors(adapter / "adapter_model.safetensors", rename)
    cause = words("export", "vllm", adapter, "-o", folder / "out", "--no-convert")
    return Case(
        cause, words(adapter, "-o", folder / "lora"), words("export", "vllm", folder / "lora", "-o", folder / "out")
    )


def single_experts(folder: Path) -> Case:
    tiny_moe().save_pretrained(folder / "base")
    shapes = {"gate_proj": (48, 64), "up_proj": (48, 64), "down_proj": (64, 48)}
    matrices = {
        f"model.layers.{layer}.mlp.experts.{expert}.{name}": (torch.ones(2, n), torch.ones(m, 2))
        for layer in range(2)
        for expert in range(EXPERTS)
        for name, (m, n) in shapes.items()
    }
    fields = {"target_modules": list(shapes), "base_model_name_or_path": str(folder / "base")}
    adapter = write_adapter(folder / "in", matrices, **fields)
    return Case(words("export", "merge", adapter, "-o", folder / "out"), words(adapter, "-o", folder / "out"))


def earlier_names(folder: Path) -> Case:
    adapter, merge = llava_of_transformers_4(folder), ("-o", folder / "merged")
    again = words("export", "merge", folder / "lora", *merge)
    return Case(words("export", "merge", adapter, *merge), words(adapter, "-o", folder / "lora"), again)


APPROXIMATED = ("--approximate-to-rank", "3")
REMEDIES: dict[str, list[Callable[[Path], Case]]] = {
    "merge it into its base model with `loraover export merge`": [
        *map(merged, ("biases", "saved norm", "saved classifier", "tied, saved head", "tied, kept so"))
    ],
    "merge the adapter with `loraover export merge`": [changed_rows("convert")],
    "or write it with `loraover export merge`": [changed_rows("vllm")],
    "make it a plain LoRA with `loraover export convert`": [trained_tokens],
    "Write it again with loraover export convert": [old_experts],
    "write it with loraover export vllm": [stacked_experts],
    "Export one graph for all your adapters: loraover export onnx A B ... --mode swappable": [other_targets],
    "compare the answers with PyTorch's: loraover verify --engine vllm": [unread_release],
    "`loraover export convert` makes a plain LoRA of an AdaLoRA": [adalora],
    "`loraover export onnx --mode merged` exports such a model": [classifier],
    "`loraover export convert` makes plain LoRAs of adapters of other kinds": [
        another_kind("loha", "vllm", cause=("--no-convert",))
    ],
    "or approximate it by a plain LoRA with `loraover export convert` and --approximate-to-rank": [
        another_kind("dora", "gguf", *APPROXIMATED)
    ],
    "write an approximation with `loraover export convert` and --approximate-to-rank": [
        another_kind("oft", "vllm", *APPROXIMATED)
    ],
    "Approximate it with `loraover export convert` and --approximate-to-rank": [
        another_kind("dora", "check", *APPROXIMATED)
    ],
    "`loraover export convert` makes an exact plain LoRA of a PiSSA or OLoRA": [another_kind("pissa", "mlx")],
    "make an exact plain LoRA of a PiSSA or OLoRA with loraover export convert": [
        another_kind("olora", "vllm", cause=("--no-convert",))
    ],
    "for engines, write it with `loraover export vllm`": [single_experts],
    "get the base model's names by `loraover export convert`": [earlier_names],
    "loraover export convert renames the tensors where one prefix fits": [another_prefix],
}
"""Cases of each message that names a command, by the part of the message that names it."""

COMPLETE = "export the adapter for vLLM and serve the exported folder: "
"""Beginning of a remedy whose command is complete, so that no literal holds it."""

FACTS = (
    "adapters that `loraover export ",
    "which `loraover export convert` writes as an exact plain LoRA of rank ",
    "loraover train ended without a result",
    "of training batches, which loraover train does not measure",
    "loraover record",
)
"""Texts that name a command, and do not say to run it."""


def literals(path: Path) -> Iterator[str]:
    """Texts of a module but for docstrings and what describes commands, whose examples test_commands.py parses."""
    skipped: set[ast.AST] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Expr():
                skipped.add(node.value)
            case ast.Assign(targets=[ast.Name(id="EXAMPLES" | "examples" | "verb")]):
                skipped |= set(ast.walk(node))
            case ast.Call(func=ast.Name(id="option" | "argument")):
                skipped |= set(ast.walk(node))
            case ast.JoinedStr():
                skipped |= set(node.values)
                yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
            case ast.Constant(value=str(text)) if node not in skipped:
                yield text


def test_every_message_with_a_command_has_a_row() -> None:
    found = [text for package in PACKAGES for path in package.rglob("*.py") for text in literals(path)]
    naming = [text for text in found if NAMED.search(text)]
    assert [text for text in naming if not any(part in text for part in (*REMEDIES, *FACTS))] == []
    assert [part for part in FACTS if not any(part in text for text in naming)] == []
    assert [part for part in REMEDIES if sum(part in text for text in naming) != 1] == []
    assert any(text.startswith(COMPLETE) for text in found)


RIDDLES = re.compile(
    r"(?<!there )\b(?:is|are) no (?!longer|such)|\bof (?:its|their) own\b|\bgo(?:es)? on\b|\bgone o"
    r"|\b(?:ends|means) nothing|\bnats remain|\bleft behind"
    r"|\b(?:none|it|one) says\b|\bholds until\b|\bquestion whether\b"
)
"""Idioms of ours that a reader whose first language is not English has to guess."""


def test_no_message_and_no_help_text_is_a_riddle() -> None:
    found = []
    for path in (path for package in PACKAGES for path in package.rglob("*.py")):
        nodes = [*ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
        docstrings = {node.value for node in nodes if isinstance(node, ast.Expr)}
        texts = [node.value for node in nodes if isinstance(node, ast.Constant) and node not in docstrings]
        helps = [ast.get_docstring(one) for one in nodes if isinstance(one, ast.ClassDef) and "Request" in one.name]
        found += [(path.name, one) for one in (*texts, *helps) if isinstance(one, str) and RIDDLES.search(one)]
    assert found == []


CASES = [(part, case) for part, cases in REMEDIES.items() for case in cases] + [(COMPLETE, patterns)]
MARKS: dict[Callable[[Path], Case], list[pytest.MarkDecorator]] = {
    other_targets: [pytest.mark.engine, pytest.mark.matrix],
    classifier: [pytest.mark.engine],
    unread_release: [pytest.mark.matrix],
}
"""A remedy that exports three graphs, and one that starts vLLM, which answers to it in test_verify_vllm.py as well."""


@pytest.mark.process
@pytest.mark.parametrize(("part", "case"), [pytest.param(*row, marks=MARKS.get(row[1], [])) for row in CASES])
def test_a_remedy_works(
    part: str, case: Callable[[Path], Case], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    made = case(tmp_path)
    message = shown(made.cause, capfd)
    assert part in message
    line = message[message.index(part) :]
    command = line[line.index("loraover ") :].splitlines()[0] if part == COMPLETE else NAMED.search(line)
    assert command is not None
    named = shlex.split(command if isinstance(command, str) else command[0])[1:]
    completed = [word for word in named if word not in ("A", "B", "...")] + made.rest
    assert run(cli, completed) in made.codes, capfd.readouterr()
    if made.again is not None:
        assert run(cli, made.again) == 0, capfd.readouterr()


def shown(cause: list[str] | Callable[[], object], capfd: pytest.CaptureFixture[str]) -> str:
    """What a command or a function says, with the line breaks of a narrow terminal taken out."""
    if not isinstance(cause, list):
        with pytest.raises(ConfigError) as caught:
            cause()
        return str(caught.value)
    capfd.readouterr()
    run(cli, cause)
    return "".join(capfd.readouterr())
