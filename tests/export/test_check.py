"""`loraover check`: for each engine, the verdict on every kind of adapter, in both forms."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from loraover.common.command_line import run
from loraover.common.errors import LoraOverError
from loraover_export import CheckReport, check_adapter
from loraover_export.check.engines import ENGINES
from loraover_export.check.features import FEATURES
from loraover_export.cli import cli

from support.check_cases import CASES, EXPECTED, Change, both, embedding, head
from support.make_checkpoint import SERVABLE, edit_json, edit_tensors, make_checkpoint, tree
from support.plain_adapter import make_adapter
from support.refusals import only_error
from support.tiny_models import saved, tiny_bart, tiny_bert, tiny_gpt2, tiny_llama, with_lora
from support.vllm_damage import DAMAGES, Q0, TENSORS, config

HEAD = "base_model.model.classifier"
PLAIN = {"rank_pattern": {}, "r": 4, "lora_alpha": 4}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tests copy it before they change it; its scaling is 1."""
    return make_adapter(tmp_path_factory.mktemp("llama"), "Llama", **PLAIN)


@pytest.fixture(scope="module")
def reports(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, CheckReport]:
    """The report on every case."""
    folder = tmp_path_factory.mktemp("cases")
    return {
        name: check_adapter(changed(source, folder / str(number), change))
        for number, (name, change) in enumerate(CASES.items())
    }


def changed(source: Path, folder: Path, change: Change) -> Path:
    shutil.copytree(source, folder)
    change(folder)
    return folder


@pytest.mark.parametrize("engine", ENGINES)
def test_every_case_has_its_verdicts(engine: str, reports: dict[str, CheckReport]) -> None:
    found = {}
    for name, report in reports.items():
        check = next(check for check in report.engines if check.engine == engine)
        found[name] = (check.as_it_is.verdict, check.exported.verdict)
    assert found == EXPECTED[engine]


def test_every_verdict_that_is_not_right_has_a_reason(reports: dict[str, CheckReport]) -> None:
    for name, report in reports.items():
        for check in report.engines:
            for treatment in (check.as_it_is, check.exported):
                reasons = [finding for finding in treatment.findings if finding.level != "note"]
                assert bool(reasons) == (treatment.verdict != "right"), (name, check.engine)
                assert all(finding.found.strip() for finding in treatment.findings)


def test_every_feature_occurs_in_a_case_or_a_test(reports: dict[str, CheckReport]) -> None:
    named = {
        finding.feature
        for report in reports.values()
        for check in report.engines
        for treatment in (check.as_it_is, check.exported)
        for finding in treatment.findings
    }
    elsewhere = {
        "task",
        "no fields",
        "modules_to_save",
        "rank_pattern",
        "tied embedding",
        "tied head",
        "quantised base",
        "cores",
    }
    assert set(FEATURES) - elsewhere <= named


@pytest.mark.parametrize("name", [name for name, damage in DAMAGES.items() if damage.rule != "patterns"])
def test_vllms_own_loader_agrees(name: str, source: Path, tmp_path: Path) -> None:
    """`tests/export/test_vllm_readers.py` holds `vllm_refuses` against the real loader."""
    damage = DAMAGES[name]
    report = check_adapter(changed(source, tmp_path / "in", damage.change), engines="vllm")
    assert report.engines[0].as_it_is.verdict == ("refused" if damage.vllm_refuses else "wrong silently")


def test_a_rank_pattern_is_applied_by_all_that_read_it(source: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path, "Llama", r=4, lora_alpha=4, rank_pattern={"q_proj": 6})
    verdicts = {check.engine: check.as_it_is.verdict for check in check_adapter(adapter).engines}
    assert {verdicts[engine] for engine in ("vllm", "llamacpp", "onnx", "torch")} == {"right"}
    assert verdicts["openvino"] == "wrong silently"


@pytest.mark.parametrize(("change", "engine", "verdict"), [
    (embedding, "llamacpp", ("wrong silently", "refused")),
    (head, "llamacpp", ("refused", "refused")),
    (embedding, "mlx", ("refused", "refused")),
    (head, "mlx", ("refused", "refused")),
])  # fmt: skip
def test_a_tied_head(change: Change, engine: str, verdict: tuple[str, str], source: Path, tmp_path: Path) -> None:
    base = shutil.copytree(source.parent / "base", tmp_path / "base")
    edit_json(base / "config.json", lambda content: content.update(tie_word_embeddings=True))
    report = check_adapter(changed(source, tmp_path / "in", change), engines=engine, model=base)
    assert (report.engines[0].as_it_is.verdict, report.engines[0].exported.verdict) == verdict


def test_a_quantised_base_is_noted_and_keeps_peft_from_pissa(source: Path, tmp_path: Path) -> None:
    base = shutil.copytree(source.parent / "base", tmp_path / "base")
    quantised = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    edit_json(base / "config.json", lambda content: content.update(quantization_config=quantised))
    plain = check_adapter(source, engines="llamacpp", model=base).engines[0].as_it_is
    assert plain.verdict == "right"
    assert "quantised (bitsandbytes)" in " ".join(finding.found for finding in plain.findings)
    pissa = changed(source, tmp_path / "in", CASES["PiSSA"])
    assert check_adapter(pissa, engines="torch", model=base).engines[0].as_it_is.verdict == "refused"


@pytest.mark.parametrize(
    "saved_as",
    [
        LoHaConfig(target_modules=["q_proj"]),
        LoraConfig(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3]}),
        LoraConfig(target_modules=["q_proj"], modules_to_save=["mlp"]),
    ],
    ids=["LoHa", "trained tokens", "a trained module"],
)
def test_what_peft_saves(saved_as: PeftConfig, source: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(source.parent / "base")
    get_peft_model(model, saved_as).save_pretrained(tmp_path / "in")
    report = check_adapter(tmp_path / "in", engines=("vllm", "llamacpp", "openvino", "torch"))
    assert [check.as_it_is.verdict for check in report.engines] == ["refused", "refused", "wrong silently", "right"]
    assert {check.exported.verdict for check in report.engines} == {"refused"}
    is_exact = saved_as.peft_type == "LOHA" or saved_as.trainable_token_indices is not None
    assert {check.converted is not None for check in report.engines} == {is_exact}


@pytest.mark.parametrize("matrix", [None, torch.tensor(1.0), torch.ones(4, 64, 1)], ids=["missing", "0-D", "3-D"])
def test_a_damaged_file_is_refused_by_all_but_peft(matrix: Tensor | None, source: Path, tmp_path: Path) -> None:
    def damage(tensors: dict[str, Tensor]) -> None:
        del tensors[f"{Q0}.lora_A.weight"]
        tensors.update({} if matrix is None else {f"{Q0}.lora_A.weight": matrix})

    folder = changed(source, tmp_path / "in", lambda folder: edit_tensors(folder / TENSORS, damage))
    for check in check_adapter(folder).engines:
        is_loaded = matrix is None and check.engine in ("torch", "onnx")  # PEFT starts a missing matrix again
        assert check.as_it_is.verdict == ("wrong silently" if is_loaded else "refused")
        assert check.exported.verdict == "refused"


def test_a_checkpoint_is_read_by_its_matrices(tmp_path: Path) -> None:
    made = make_checkpoint(tmp_path, base_options=SERVABLE)
    report = check_adapter(made.path)
    for check in report.engines:
        assert check.exported.verdict == "right"
        if check.engine != "mlx":
            assert "cores" in {finding.feature for finding in check.as_it_is.findings}
    assert shlex.split(report.engines[-1].export)[2] == "fold"


def test_a_classifier_is_no_language_model(tmp_path: Path) -> None:
    tiny_bert().save_pretrained(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    adapted = get_peft_model(model, LoraConfig(target_modules=["query"], task_type="SEQ_CLS"))
    adapted.save_pretrained(tmp_path / "in")
    verdicts = {check.engine: check.as_it_is.verdict for check in check_adapter(tmp_path / "in").engines}
    assert verdicts["vllm"] == verdicts["onnx"] == verdicts["openvino"] == "refused"
    assert verdicts["torch"] == "right"


@pytest.mark.parametrize("kind", [LoraConfig, LoHaConfig])
def test_a_classifier_without_its_head_is_refused(kind: type[LoraConfig | LoHaConfig], tmp_path: Path) -> None:
    """By PEFT, and so by what reads it with PEFT; a conversion does not keep the head either."""
    saved(AutoModelForSequenceClassification.from_config(tiny_bert().config), tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    adapted = get_peft_model(model, kind(target_modules=["query"], task_type="SEQ_CLS", modules_to_save=["classifier"]))
    adapted.save_pretrained(tmp_path / "in")
    (onnx, torch_) = check_adapter(tmp_path / "in", engines=["onnx", "torch"]).engines
    assert "right" in (onnx.exported.verdict, onnx.converted and onnx.converted.verdict)
    assert torch_.as_it_is.verdict == "right"
    edit_tensors(tmp_path / "in" / TENSORS, lambda found: [found.pop(f"{HEAD}.{name}") for name in ("weight", "bias")])
    for check in check_adapter(tmp_path / "in", engines=["onnx", "torch"]).engines:
        assert check.as_it_is.verdict == check.exported.verdict == "refused"
        assert check.converted is None
    (lost,) = [finding.found for finding in check.as_it_is.findings if finding.feature == "lost parameters"]
    assert "names classifier.weight, classifier.bias, which the file of tensors lacks" in lost


@pytest.mark.parametrize("base", [tiny_bart, tiny_llama])
def test_the_onnx_export_has_no_graph_for_every_task(base: Callable[[], Any], tmp_path: Path) -> None:
    model = saved(base(), tmp_path / "base")
    task = "SEQ_2_SEQ_LM" if base is tiny_bart else "QUESTION_ANS"
    with_lora(model, task_type=task).save_pretrained(tmp_path / "in")
    exported = check_adapter(tmp_path / "in", engines="onnx").engines[0].exported
    (finding,) = exported.findings
    assert exported.verdict == "refused"
    assert ("'bart'" if base is tiny_bart else f"task_type is {task!r}") in finding.found


def test_a_family_that_the_table_of_row_orders_lacks(tmp_path: Path) -> None:
    tiny_gpt2().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(model, LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)).save_pretrained(tmp_path / "in")
    check = check_adapter(tmp_path / "in", engines="llamacpp").engines[0]
    assert check.exported.verdict == "refused"
    assert "GPT2LMHeadModel" in check.exported.findings[0].found


def test_vllm_needs_an_option_for_a_larger_rank(reports: dict[str, CheckReport]) -> None:
    notes = [finding.found for finding in reports["rank 32"].engines[0].as_it_is.findings]
    assert any("--max-lora-rank 32" in note for note in notes)


@pytest.mark.process
def test_commands_that_mend_do_what_the_report_says(reports: dict[str, CheckReport]) -> None:
    """One that writes a right adapter succeeds, and one that refuses the adapter does; ONNX's is parsed alone."""
    codes: dict[str, int] = {}
    for name, report in reports.items():
        for check in report.engines:
            program, group, *words = shlex.split(check.export)
            assert (program, group) == ("loraover", "export")
            if check.conversion is not None:
                continue  # the folder is made by `test_the_conversion_that_a_report_names_is_made_and_exported`
            if words[0] == "onnx":
                command = cli.get_command(None, "onnx")  # type: ignore[arg-type]
                assert command is not None
                command.make_context("onnx", words[1:])
                continue
            if check.export not in codes:
                codes[check.export] = run(cli, words)
            refuses = check.exported.verdict == "refused"
            assert (codes[check.export] != 0) == refuses, (name, check.engine, check.export)


def test_an_export_lies_beside_the_folder_that_a_user_is_in(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = changed(source, tmp_path / "in", lambda folder: None)
    monkeypatch.chdir(folder)
    for check in check_adapter(".").engines:
        words = shlex.split(check.export)
        assert words[3] == str(folder)
        assert Path(words[words.index("-o") + 1]).parent == tmp_path


def test_the_text_fits_80_columns_and_names_the_export(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    changed(source, Path("in"), both(CASES["rsLoRA"], config(alpha_pattern={"q_proj": 12})))
    before = tree(tmp_path)
    assert run(cli, ["check", "in", "--model", str(source.parent / "base")]) == 0
    assert tree(tmp_path) == before
    out = capsys.readouterr().out
    folder = Path("in").resolve()
    assert f"loraover export gguf {folder} -o {folder}.gguf" in out
    assert "llamacpp  right           wrong silently " in out
    commands_and_paths = ("loraover export", str(source.parent))
    assert all(len(line) <= 80 or any(part in line for part in commands_and_paths) for line in out.splitlines())


def test_reasons_that_no_export_mends_are_shown_once(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = str(changed(source, tmp_path / "in", CASES["DoRA"]))
    assert run(cli, ["check", adapter]) == 0  # PyTorch takes it as it is
    out = " ".join(capsys.readouterr().out.split())
    assert out.count("A and B cannot hold this") == 1
    assert "vllm, llamacpp, onnx, openvino, mlx: use_dora" in out
    assert "Approximate it with `loraover export convert` and --approximate-to-rank" in out
    assert run(cli, ["check", adapter, "--engine", "torch", "--engine", "mlx"]) == 1
    assert "no form suits mlx" in capsys.readouterr().out
    assert run(cli, ["check", str(source), "--engine", "torch", "--engine", "mlx"]) == 0
    assert "check passed: only the exported form suits mlx" in capsys.readouterr().out


CONVERTIBLE = ("LoHa", "PiSSA", "OLoRA", "trained tokens", "no prefix", "another prefix", "a doubled prefix")


def test_what_convert_makes_exactly_is_right_as_exported_by_us(reports: dict[str, CheckReport]) -> None:
    for name, report in reports.items():
        for check in report.engines:
            verdicts = (check.exported.verdict, None if check.converted is None else check.converted.verdict)
            if check.exported.verdict == "right" or name not in CONVERTIBLE:
                assert verdicts[1] is None, (name, check.engine)
            elif name == "trained tokens":  # an embedding, which OpenVINO does not adapt
                assert verdicts == ("refused", "wrong silently" if check.engine == "openvino" else "right"), (
                    check.engine
                )
            else:
                assert verdicts == ("refused", "right"), (name, check.engine)
    assert "rank r^2" in reports["LoHa"].engines[0].by_us.findings[0].found


def test_the_conversion_that_a_report_names_is_made_and_exported(source: Path, tmp_path: Path) -> None:
    check = check_adapter(changed(source, tmp_path / "in", CASES["another prefix"]), engines="vllm").engines[0]
    assert check.is_mended
    for command in check.commands.split(" && "):
        assert run(cli, shlex.split(command)[2:]) == 0


@pytest.mark.parametrize(("options", "code"), [((), 0), (("--engine", "vllm", "--engine", "mlx"), 1)])
def test_exit_code_and_json(
    options: tuple[str, ...], code: int, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = changed(source, tmp_path / "in", CASES["a trained head"])
    assert run(cli, ["check", str(source), "--json", *options]) == code
    out = capsys.readouterr().out
    report = CheckReport.model_validate(json.loads(out))
    assert report == check_adapter(source, engines=options[1::2])
    assert report.verdict == ("failed" if code else "passed")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: shutil.rmtree(folder), "no such folder"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"no"), "adapter_model.safetensors"),
        (config(base_model_name_or_path=None), "model"),
        (config(base_model_name_or_path="./nowhere"), "nowhere"),
        (config(rank_pattern={"q_proj": 0}), "rank_pattern"),
        (config(target_parameters=True), "target_parameters"),
        (config(trainable_token_indices=5), "trainable_token_indices"),
        (config(modules_to_save=5), "modules_to_save"),
    ],
    ids=["folder", "tensors", "no base", "base", "rank 0", "parameters", "tokens", "saved modules"],
)
def test_a_request_that_cannot_be_used(change: Change, words: str, source: Path, tmp_path: Path) -> None:
    with pytest.raises(LoraOverError, match=words):
        check_adapter(changed(source, tmp_path / "in", change))


def test_an_unknown_engine_is_refused(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(cli, ["check", str(source), "--engine", "abacus"]) == 2
    assert "abacus" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"'abacus', expected one of vllm, llamacpp"):
        check_adapter(source, engines="abacus")
    assert run(cli, ["check", f"{source}.lost"]) == 2
    assert "no such folder" in only_error(capsys.readouterr().err)
