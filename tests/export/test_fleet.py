"""Many adapters at once: rows, exit codes, the page in a browser, processes that are killed, and Ray Data."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import subprocess
import sys
from html import escape, unescape
from pathlib import Path
from typing import Any

import pytest

from loraover.checkpoint.source import read_source
from loraover.common.command_line import run
from loraover_export import prepare_adapter
from loraover_export.cli import cli
from loraover_export.prepare.fleet import check_fleet, each, prepare_fleet
from loraover_export.prepare.report import FleetReport, FleetRow, to_page

from support.chromium import chromium
from support.killed_work import lost, square
from support.make_checkpoint import edit_json
from support.plain_adapter import make_adapter

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
PRESS = """<script>
onload = () => {
  const page = document.querySelector("iframe").contentDocument, found = []
  const rows = () => [...page.querySelectorAll("tbody")].filter(row => !row.hidden)
  const shown = () => rows().map(row => row.rows[0].cells[1].textContent)
  const press = name => [...page.querySelectorAll("th button")].find(head => head.textContent === name).click()
  found.push(shown())
  press("rank"); found.push(shown())
  press("rank"); found.push(shown())
  press("adapter"); found.push(shown())
  const form = page.querySelector("form"), changed = () => form.dispatchEvent(new Event("input"))
  form.elements.text.value = "LOHA"; changed(); found.push(shown())
  form.elements.text.value = ""; form.elements.verdict.value = "refused"; changed(); found.push(shown())
  document.title = JSON.stringify(found)
}
</script>"""


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A plain adapter, one that no engine loads, and one that is not there."""
    folder = tmp_path_factory.mktemp("fleet")
    plain = make_adapter(folder / "made", "Llama")
    broken = shutil.copytree(plain, folder / "broken")
    (broken / "adapter_model.safetensors").write_bytes(b"\0" * 100)
    return {"plain": plain, "broken": broken, "missing": folder / "missing"}


def test_an_adapter_that_names_no_base_is_said_so_in_a_new_cache(fleet: dict[str, Path], tmp_path: Path) -> None:
    nameless = shutil.copytree(fleet["plain"], tmp_path / "nameless")
    edit_json(nameless / "adapter_config.json", lambda config: config.update(base_model_name_or_path=None))
    (row,) = prepare_fleet(nameless, cache=tmp_path / "new" / "cache").rows
    assert row.reason == f"{nameless}: names no base model; name one that you trust with --model."
    assert (tmp_path / "new" / "cache" / "prepare.html").is_file()


def test_one_bad_adapter_ends_nothing(fleet: dict[str, Path], tmp_path: Path) -> None:
    sources = [*map(str, fleet.values()), "nonsense://x", str(fleet["plain"])]
    lines: list[str] = []
    report = prepare_fleet(sources, cache=tmp_path / "cache", receive=lambda row, progress: lines.append(progress))
    assert [row.source for row in report.rows] == sources[:4], "each once, in their order"
    plain, broken, missing, elsewhere = report.rows
    assert (plain.verdict, plain.kind, plain.cached) == ("prepared", "LORA", False)
    assert Path(str(plain.path)).joinpath("adapter_model.safetensors").is_file()
    assert (broken.verdict, broken.kind) == ("refused", "LORA")
    assert "not a complete safetensors file" in broken.reason
    assert missing.verdict == "refused"
    assert elsewhere.verdict == "failed"
    assert (report.exit_code, report.counts()) == (1, "1 prepared, 2 refused, 1 failed")
    assert lines[-1] == "4 of 4, 0 s left"
    assert "2 refused" in (tmp_path / "cache" / "prepare.html").read_text()
    again = prepare_fleet(sources[0], cache=tmp_path / "cache", html=tmp_path / "new" / "again.html")
    assert (again.rows[0].cached, again.rows[0].path, again.exit_code) == (True, plain.path, 0)
    assert (tmp_path / "new" / "again.html").is_file()


def test_a_fault_of_this_program_is_a_row(fleet: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*places: Any, **keywords: Any) -> None:
        raise ZeroDivisionError("surprise")

    monkeypatch.setattr("loraover_export.check.run.check_adapter", broken)
    (row,) = check_fleet([fleet["plain"]]).rows
    assert (row.verdict, row.reason) == ("failed", "ZeroDivisionError: surprise. Please report this.")


def test_the_check_of_several_prints_a_line_for_each(
    fleet: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["check", *map(str, (fleet["plain"], fleet["broken"])), "--engine", "vllm"]
    assert run(cli, [*words, "--json"]) == 1
    out, err = capsys.readouterr()
    rows = [FleetRow.model_validate_json(line) for line in out.splitlines()]
    assert [(row.verdict, row.engines) for row in rows] == [("right", {"vllm": "right"}), ("refused", {})]
    assert "1 right, 1 refused, of 2 adapters" in err
    assert re.search(rf"verdict +adapter +vllm *\n.*\n *right +{fleet['plain'].parent}", err)
    assert run(cli, [*words[:2], "--engine", "vllm", "--html", str(tmp_path / "check.html")]) == 0
    assert "Of 1 adapter: 1 right." in (tmp_path / "check.html").read_text()


def test_no_verdict_on_an_adapter_is_better_than_those_on_its_engines(fleet: dict[str, Path], tmp_path: Path) -> None:
    """PEFT's form is wrong silently on OpenVINO, and mlx-lm refuses it. PyTorch alone is right on a DoRA."""
    dora = shutil.copytree(fleet["plain"], tmp_path / "dora")
    edit_json(dora / "adapter_config.json", lambda config: config.update(use_dora=True))

    def verdicts(source: Path, *engines: str) -> tuple[str, str]:
        report = check_fleet(source, engines=engines)
        assert report.exit_code == 0
        verdict = to_page(report, "").html.split('<section class="verdict ')[1].split('"')[0]
        return report.rows[0].verdict, verdict

    assert verdicts(fleet["plain"], "vllm", "torch") == ("right", "good")
    assert verdicts(fleet["plain"], "vllm", "openvino") == ("right as exported", "open")
    assert verdicts(dora) == ("right on some", "open")
    (row,) = check_fleet(fleet["plain"], engines=("openvino", "mlx")).rows
    assert row.engines == {"openvino": "wrong silently", "mlx": "refused"}
    assert row.exported == {"openvino": "right", "mlx": "right"}
    assert [line.partition(":")[0] for line in row.reason.splitlines()] == ["openvino", "mlx"]


def test_onnx_needs_a_graph(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(cli, ["prepare", "x", "--cache", str(tmp_path / "cache"), "--engine", "onnx"]) == 2
    assert "--engine onnx needs --model" in capsys.readouterr().err


def test_the_function_can_be_sent_to_other_processes() -> None:
    assert pickle.loads(pickle.dumps(prepare_adapter)) is prepare_adapter  # noqa: S301  written here


@pytest.mark.process
def test_a_process_that_is_killed_takes_nothing_along() -> None:
    assert dict(each(square, range(6), 2, lost)) == {0: 0, 1: 1, 2: 4, 3: -3, 4: 16, 5: 25}


def row(name: str, verdict: Any, kind: str, rank: int | None) -> FleetRow:
    return FleetRow(source=name, address=name, verdict=verdict, kind=kind, rank=rank)


@pytest.mark.engine
def test_the_page_sorts_and_filters(tmp_path: Path) -> None:
    rows = [row("b", "prepared", "LORA", 16), row("c", "refused", "LOHA", None), row("a", "prepared", "LOHA", 8)]
    page = to_page(FleetReport(rows=rows, seconds=1), "loraover export prepare").html
    frame = f'<iframe srcdoc="{escape(page)}"></iframe>'
    shown, console = chromium(tmp_path, f"<title></title>{PRESS}<body>{frame}", "--dump-dom")
    assert console == []
    found = re.search(r"<title>(\[.*?\])</title>", shown, re.DOTALL)
    assert found is not None
    named, by_rank, turned, by_name, loha, refused = json.loads(unescape(found[1]))
    assert (named, by_rank, turned) == (["b", "c", "a"], ["a", "b", "c"], ["c", "b", "a"])
    assert (by_name, loha, refused) == (["a", "b", "c"], ["a", "c"], ["c"])


@pytest.mark.matrix
def test_a_fleet_on_ray_data(fleet: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("ray.data", reason="Ray is in the extra ray")
    words = [sys.executable, EXAMPLES / "prepare_on_ray.py", tmp_path / "cache", fleet["plain"], fleet["broken"]]
    ran = subprocess.run([*map(str, words)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    rows = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
    found = {Path(row["adapter"]).name: (row["done"], row["reason"]) for row in rows}
    assert found["adapter"] == ("rewritten", "")
    assert "not a complete safetensors file" in found["broken"][1]
    assert (tmp_path / "cache").is_dir()


@pytest.mark.process
@pytest.mark.parametrize("options", [["--engine", "vllm"], [], ["--model"]], ids=["vllm", "all", "all on a model"])
def test_a_check_of_a_known_model_imports_no_torch(fleet: dict[str, Path], options: list[str]) -> None:
    """Which is most of its time, and of the start of a hook."""
    code = (
        "import sys; from loraover.common.command_line import run; from loraover_export.cli import cli; "
        "code = run(cli, ['check', *sys.argv[1:]]); "
        "sys.exit(code or sorted({'torch', 'transformers', 'peft'} & {*sys.modules}) or 0)"
    )
    base = read_source(fleet["plain"]).config.base_model_name_or_path
    model = [base] if options == ["--model"] else []
    words = [sys.executable, "-c", code, fleet["plain"], *options, *model]
    check_fleet(fleet["plain"], engines="vllm")
    ran = subprocess.run([*map(str, words)], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
