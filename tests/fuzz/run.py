"""Run a case: save its adapter, export it, and compare what was written with what PEFT computes."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

import loraover_export as export
from loraover.common.errors import LoraOverError

from fuzz.cases import DTYPES, Case, save_adapter, save_base
from fuzz.oracle import Effects, effects, load_adapted, load_plain, logits, single

CASE_S = 60.0
"""Seconds of the processor after which a case is called endless."""
Outcome = Literal["agrees", "refused", "not made", "fault"]
REGRESSIONS = Path(__file__).parent / "regressions.jsonl"
"""The cases that once failed, one a line, which may leave out what is as `Case` has it."""


@dataclass(frozen=True)
class Result:
    """What became of a case.

    Args:
        outcome: "agrees" with PEFT, "refused" by us, "not made" where PEFT itself refuses it, or a "fault".
        found: What was found, in words.
    """

    outcome: Outcome
    found: str = ""

    @property
    def cause(self) -> str:
        """The finding without its figures, paths and names of modules, by which like faults are one."""
        return re.sub(r"(/\S+|the delta of \w+|[-+.\de]*\d[-+.\de]*)", "#", self.found)[:160]


NOT_PASSED = Result("refused", "the verdict is not passed")


class Fault(Exception):  # noqa: N818  what is looked for, not a mishap
    """An export that is wrong."""


@dataclass(frozen=True)
class Written:
    """What an export left behind, and how far it may be from its source.

    Args:
        model: The written model as PEFT or transformers loads it, in float64; None if only the norm is known.
        norm: Norm of all written deltas together, if there is no model.
        bounds: Bounds of the error of each delta, by path; the largest holds for experts.
        relative: Further error, relative to the delta.
        zeros: Paths of modules of whose A or B every written element is zero.
        is_whole: Whether nothing was left out on purpose, so that logits have to be kept.
    """

    model: Any = None
    norm: float | None = None
    bounds: dict[str, float] | None = None
    relative: float = 0.0
    zeros: frozenset[str] = frozenset()
    is_whole: bool = True


@dataclass(frozen=True)
class Place:
    """A case, and its folders."""

    case: Case
    base: Path
    adapter: Path
    output: Path

    def peft(self, folder: Path) -> Any:
        """Return the model with an adapter, in float64."""
        return load_adapted(self.base, folder, self.case.task)


def run(case: Case, bases: Path) -> Result:
    """Return what becomes of a case."""
    with TemporaryDirectory() as scratch:
        place = Place(case, bases, Path(scratch, "adapter"), Path(scratch, "out"))
        try:
            place = replace(place, base=save_base(case, bases))
            save_adapter(case, place.base, place.adapter)
        except Exception as error:  # PEFT's refusals are of every type
            return Result("not made", f"{type(error).__name__}: {error}")
        try:
            with _limited():
                made = VERBS[case.verb](place)
            return made if isinstance(made, Result) else _compare(place, made)
        except LoraOverError as error:
            return Result("refused", str(error))
        except Fault as fault:
            return Result("fault", str(fault))
        except Exception:
            return Result("fault", traceback.format_exc(limit=-2).strip().splitlines()[-1] + _where())


@contextmanager
def _limited() -> Iterator[None]:
    """Raise Fault in a body that computes for too long."""

    def end(*_: Any) -> None:
        raise Fault(f"it has not ended after {CASE_S:g} s of the processor")

    earlier = signal.signal(signal.SIGVTALRM, end)
    signal.setitimer(signal.ITIMER_VIRTUAL, CASE_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, earlier)


def _where() -> str:
    """Return the last line of ours in the traceback of the present exception."""
    lines = [line.strip() for line in traceback.format_exc().splitlines() if line.strip().startswith('File "')]
    ours = [line for line in lines if "loraover" in line]
    return f" ({(ours or lines)[-1]})"


def _compare(place: Place, written: Written) -> Result:
    try:
        source = place.peft(place.adapter)
        plain = load_plain(place.base, place.case.task).double()
        expected, sizes = effects(source, plain), _sizes(plain)
    except Exception as error:  # PEFT cannot read what it saved, or the edits of it
        return Result("not made", f"{type(error).__name__}: {error}")
    if written.model is None:
        _compare_norms(expected, written)
        return Result("agrees")
    found = effects(written.model, plain)
    own = single(place.case.kind, place.case.options)
    for path in sorted(written.zeros & expected.keys()):
        if expected[path].norm() > max(own, 1e-9) * sizes[path]:
            raise Fault(f"the delta of {_leaf(path)} vanished, of norm {expected[path].norm():.3g}")
    allowed = _compare_effects(expected, found, written, own, sizes)
    if written.is_whole:
        _compare_logits(source, written.model, plain, allowed)
    return Result("agrees")


def _sizes(plain: Any) -> dict[str, float]:
    return {path: float(m.weight.detach().norm()) for path, m in plain.named_modules() if hasattr(m, "weight")}


def _compare_effects(expected: Effects, found: Effects, written: Written, own: float, sizes: dict[str, float]) -> float:
    """Return the largest allowed error of a delta, relative to it.

    Args:
        expected: Effects of the source.
        found: Effects of what was written.
        written: What is known of it.
        own: Error of PEFT's arithmetic, relative to the delta, and to a twentieth of the base weight.
        sizes: Norms of the base weights.

    Raises:
        Fault: an error above its bound.
    """
    bounds, worst = written.bounds or {}, 0.0
    for path in sorted(expected.keys() | found.keys()):
        zero = torch.zeros(())
        wanted, got = expected.get(path, zero), found.get(path, zero)
        norm, error = float(wanted.norm()), float((got - wanted).norm())
        # experts have other names in PEFT, one for each parameter
        bound = bounds.get(path, max(bounds.values(), default=0.0) if ".experts." in path else 0.0)
        allowed = (1 + 1e-6) * bound + (written.relative + own) * norm + 0.05 * own * sizes.get(path, 0.0)
        if not error <= allowed:
            raise Fault(f"the delta of {_leaf(path)} is off by {error:.3g}, allowed {allowed:.3g}, of {norm:.3g}")
        worst = max(worst, allowed / norm if norm else 0.0)
    return worst


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]


def _compare_logits(source: Any, written: Any, plain: Any, relative: float) -> None:
    """Compare whole models, which shows what is not in a linear layer; a fault is as large as its effect.

    Errors of deltas reach the logits in about their proportion; 100 times that, and 1e-4 for the curvature, is allowed.
    """
    before, expected, found = logits(plain), logits(source), logits(written)
    if found.shape != expected.shape:
        raise Fault(f"logits have shape {tuple(found.shape)}, those of the source {tuple(expected.shape)}")
    error, effect = float((found - expected).abs().max()), float((expected - before).abs().max())
    allowed = (100 * relative + 1e-4) * effect + 1e-7 * float(expected.abs().max())
    if not error <= allowed:
        raise Fault(f"logits are off by {error:.3g}, allowed {allowed:.3g}, of an effect of {effect:.3g}")


def _compare_norms(expected: Effects, written: Written) -> None:
    """Compare the norm of all deltas together, which engines' orders of rows and stacks of experts keep."""
    wanted = sum(float(effect.square().sum()) for effect in expected.values()) ** 0.5
    assert written.norm is not None
    if not abs(written.norm - wanted) <= (written.relative + 1e-5) * wanted:
        raise Fault(f"the written deltas have norm {written.norm:.5g}, expected {wanted:.5g}")


def _convert(place: Place) -> Written | Result:
    try:
        report = export.convert_adapter(place.adapter, place.output, **place.case.arguments)
    except LoraOverError as error:
        if "--approximate-to-rank" not in str(error):
            raise
        arguments = place.case.arguments | {"approximate_to_rank": 64}
        report = export.convert_adapter(place.adapter, place.output, **arguments)
    return _certified(place, report.certificate, is_whole=not report.truncated)


def _certified(place: Place, certificate: Any, *, is_whole: bool) -> Written | Result:
    if not certificate.passed:
        return NOT_PASSED
    bounds = {module.module: module.error_bound for module in certificate.modules}
    zeros = frozenset() if not is_whole else _zeros(place.output)
    return Written(place.peft(place.output), bounds=bounds, zeros=zeros, is_whole=is_whole)


def _zeros(folder: Path) -> frozenset[str]:
    tensors = load_file(folder / "adapter_model.safetensors")
    zeros = [key for key, tensor in tensors.items() if not tensor.any()]
    return frozenset(re.sub(r"^base_model\.model\.|\.lora_.*", "", key) for key in zeros)


def _combine(place: Place) -> Written | Result:
    sources, weights = [place.adapter, place.adapter], [1.5, -0.5]
    certificate = export.combine_adapters(sources, place.output, weights=weights, **place.case.arguments)
    return _certified(place, certificate, is_whole=True)


def _shrink(place: Place) -> Written | Result:
    certificate = export.shrink_adapter(place.adapter, place.output, **place.case.arguments)
    return _certified(place, certificate, is_whole=False)


def _merge(place: Place) -> Written | Result:
    if not export.merge_adapter(place.adapter, place.output).passed:
        return NOT_PASSED
    model = load_plain(place.output, place.case.task).double()
    unit = torch.finfo(DTYPES[place.case.base_dtype]).eps
    return Written(model, bounds={path: unit * size for path, size in _sizes(model).items()})


def _unit(place: Place) -> float:
    """Return what storing A and B may change of a delta; the factor leaves room for sums that cancel."""
    return 16 * torch.finfo(DTYPES[place.case.arguments["dtype"]]).eps


def _vllm(place: Place) -> Written | Result:
    if not export.export_vllm(place.adapter, place.output, **place.case.arguments).passed:
        return NOT_PASSED
    return Written(place.peft(place.output), relative=_unit(place), zeros=_zeros(place.output))


def _mlx(place: Place) -> Written | Result:
    if not export.export_mlx(place.adapter, place.output, **place.case.arguments).passed:
        return NOT_PASSED
    tensors = load_file(place.output / "adapters.safetensors")
    return Written(norm=_norm(tensors), relative=_unit(place))


def _gguf(place: Place) -> Written | Result:
    from gguf import GGUFReader

    file = place.output.with_suffix(".gguf")
    if export.export_gguf(place.adapter, file, **place.case.arguments).verdict == "failed":
        return NOT_PASSED
    tensors = {found.name: torch.tensor(found.data).float().mT for found in GGUFReader(file).tensors}
    return Written(norm=_norm(tensors), relative=_unit(place))


def _norm(tensors: dict[str, Tensor]) -> float:
    total = 0.0
    for key, tensor in tensors.items():
        if key.endswith(".lora_a"):
            a, b = tensor.double(), tensors[f"{key[:-1]}b"].double()
            a = a if a.shape[-1] == b.shape[-2] else a.mT  # that of an embedding in llama.cpp
            total += float((a @ b).square().sum())
    return math.sqrt(total)


def _onnx(place: Place) -> Written | Result:
    from support.onnx_graph import Graph

    made = export.export_onnx(place.adapter, place.output, cache=False, **place.case.arguments)
    if made.verdict != "passed":
        return NOT_PASSED
    swapped = place.output / "adapter.onnx_adapter"
    graph = Graph(place.output / "model.onnx", swapped if swapped.is_file() else None)

    def answers(input_ids: Tensor) -> tuple[Tensor]:
        feed = {"input_ids": input_ids.numpy(), "attention_mask": torch.ones_like(input_ids).numpy()}
        feed["position_ids"] = torch.arange(input_ids.shape[1]).expand_as(input_ids).numpy()
        return (torch.from_numpy(graph.run(feed)["logits"]),)

    source, plain = place.peft(place.adapter), load_plain(place.base, place.case.task).double()
    answers.config = plain.config  # type: ignore[attr-defined]
    _compare_logits(source, answers, plain, relative=1e-3)
    return Result("agrees")


def _check(place: Place) -> Result:
    """Ask for a judgement on each engine, and compare it with what its export does; then judge what was written."""
    for engine, write in {"vllm": _vllm, "llamacpp": _gguf, "mlx": _mlx}.items():
        (judged,) = export.check_adapter(place.adapter, engines=engine).engines
        case = replace(place.case, arguments={"dtype": "fp32"})
        try:
            is_written = write(replace(place, case=case)) is not NOT_PASSED
        except LoraOverError:
            is_written = False
        if (judged.exported.verdict == "right") > is_written:
            raise Fault(f"check calls the export for {engine} right, and it refuses")
        if engine == "vllm" and is_written:
            (again,) = export.check_adapter(place.output, engines=engine).engines
            if again.as_it_is.verdict != "right":
                raise Fault(f"check refuses what was written for vllm: {again.as_it_is.findings[0].found}")
        shutil.rmtree(place.output, ignore_errors=True)
    return Result("agrees")


VERBS: dict[str, Callable[[Place], Written | Result]] = {
    "convert": _convert,
    "combine": _combine,
    "shrink": _shrink,
    "merge": _merge,
    "vllm": _vllm,
    "gguf": _gguf,
    "mlx": _mlx,
    "onnx": _onnx,
    "check": _check,
}


def simplest(case: Case, cause: str, bases: Path) -> Case:
    """Return the case with as few options as still cause the fault."""
    changes: list[dict[str, Any]] = [{name: getattr(Case, name)} for name in ("base_dtype", "stored", "fill", "rows")]
    for name in ("options", "edits"):
        held = getattr(case, name)
        changes += [{name: {k: v for k, v in held.items() if k != key}} for key in held if key != "task_type"]
    for change in changes:
        fewer = replace(case, **change)
        if fewer != case and run(fewer, bases).cause == cause:
            return simplest(fewer, cause, bases)
    return case


def keep(case: Case, file: Path = REGRESSIONS) -> None:
    """Add a failing case to the regressions."""
    with file.open("a", encoding="utf-8") as regressions:
        regressions.write(json.dumps(asdict(case)) + "\n")


def signature(case: Case, result: Result) -> tuple[str, ...]:
    """Return what like faults have in common: how files were edited, or else the kind."""
    return (case.verb, *(sorted(case.edits) or [case.kind]), *["rows"] * case.rows, result.cause)


def kept(file: Path = REGRESSIONS) -> list[Case]:
    """Return the regressions."""
    return [Case(**json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]
