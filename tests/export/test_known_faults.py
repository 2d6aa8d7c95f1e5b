"""The table of known faults, and the page of the documentation that is written from it."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import get_args

import pytest

from loraover_export import check_adapter
from loraover_export.check.engines import ENGINES
from loraover_export.check.report import Verdict
from loraover_export.known_faults import KnownFault, Versions, faults_of, known_faults
from loraover_export.merged.report import ModuleVerdict
from loraover_serve import scale_faults
from loraover_serve.judge import names

from support.plain_adapter import make_adapter

ROOT = Path(__file__).parents[2]
FAULTS = known_faults().faults
SHOWN = {value for value in vars(names).values() if isinstance(value, str)} | set(get_args(ModuleVerdict))
SHOWN |= {*get_args(Verdict), *scale_faults(4.0), "some answers are those of: stale by 1"}  # of check, and of rollouts


def test_every_fault_has_its_name_and_a_known_engine() -> None:
    assert len({(fault.engine, fault.name) for fault in FAULTS}) == len(FAULTS)
    assert {fault.engine for fault in FAULTS} == known_faults().names.keys()
    assert {"vllm", "llamacpp", "openvino"} <= ENGINES.keys() & known_faults().names.keys()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.engine}: {fault.name}")
def test_an_entry_is_complete(fault: KnownFault) -> None:
    """A fault without a thread has to be shown here, and what is named as its evidence exists."""
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+#\d+", thread) for thread in fault.threads)
    assert fault.threads or fault.shown_by
    assert not fault.symptom.endswith(".")
    assert not fault.cure.endswith(".")
    if fault.shown_by is not None:
        path, _, test = fault.shown_by.partition("::")
        assert f"def {test}(" in (ROOT / path).read_text()
    assert fault.shown_as is None or fault.shown_as in SHOWN
    assert fault.command is not None or fault.shown_as is None
    assert fault.picture is None or (ROOT / "docs" / "figures" / fault.picture).is_file()


def test_faults_are_found_by_the_words_that_users_type() -> None:
    page = (ROOT / "docs" / "faults.md").read_text()
    for words in ("vLLM LoRA same output as base", "adapter not applied", "rollout KL explodes"):
        assert [fault.name for fault in FAULTS if any(words in one for one in fault.words)]
        assert words.lower() in page.lower()
    assert [fault.name for fault in FAULTS if not fault.words] == []


def test_each_fault_has_one_place_on_the_page() -> None:
    """On the code host and in the site, whose rules differ for double hyphens and for titles that occur twice."""
    page = (ROOT / "docs" / "faults.md").read_text()
    titles = re.findall(r"^### (.+)$", page, re.MULTILINE)
    places = [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles]
    assert len(set(places)) == len(places) == len(FAULTS)
    assert not [place for place in places if "--" in place or not place.isascii()]
    assert set(re.findall(r"\]\(#([^)]+)\)", page)) == set(places)


def test_the_page_is_current() -> None:
    """Else run `python docs/write_faults.py`."""
    assert runpy.run_path(str(ROOT / "docs" / "write_faults.py"))["page"]() == (ROOT / "docs" / "faults.md").read_text()


@pytest.mark.parametrize(
    ("version", "leaks", "hopper", "by_name"),
    [
        ("0.32.0+cpu", True, False, False),
        ("0.32.0", False, True, False),
        ("0.33.0rc1+cpu", False, False, False),
        ("0.30.1", False, True, True),
        (None, False, False, False),
        ("a build", False, False, False),
    ],
)
def test_a_release_has_the_faults_of_its_range_and_device(
    version: str | None, leaks: bool, hopper: bool, by_name: bool
) -> None:
    found = {fault.name for fault in faults_of("vllm", version)}
    assert ("adapters leak into the base model on a CPU" in found) == leaks
    assert ("NaN from adapters on Hopper GPUs" in found) == hopper
    assert ("prefix cache by name alone" in found) == by_name
    assert "stale prefix cache under one path" in found


def test_a_build_without_a_version_has_the_faults_of_every_release() -> None:
    assert {fault.name for fault in faults_of("llamacpp", "b10121")} == {
        fault.name for fault in FAULTS if fault.engine == "llamacpp" and fault.versions == Versions()
    }
    assert faults_of("torch", None) == ()


def test_check_names_the_faults_of_each_engine_beside_its_verdict(tmp_path: Path) -> None:
    report = check_adapter(make_adapter(tmp_path, "Llama"))
    found = {check.engine: check.known_faults for check in report.engines}
    assert "stale prefix cache under one path" in found["vllm"]
    assert "prefix cache by name alone" not in found["vllm"]
    assert "one adapter's prompt cache serves another" in found["llamacpp"]
    assert found["torch"] == ()
    assert report.passed
