"""A cache on a disk that is full: a clear error, nothing half-written, and nothing remembered."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from loraover.common.errors import OutputError
from loraover_export import prepare_adapter
from loraover_export.prepare.cache import LOCKS
from loraover_export.prepare.fleet import prepare_fleet
from loraover_serve.plugin.worker import answer_to

from support.conversions import SOURCES, make_base, make_source
from support.small_disk import enlarge, small_disk

pytestmark = pytest.mark.process

NO_SPACE = "No space left"
LARGE_KIB = 4096


@pytest.fixture(scope="module", params=["lora", "loha"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain LoRA, which is rewritten, and one that is converted before."""
    folder = tmp_path_factory.mktemp(request.param)
    return make_source(make_base(folder / "base", "even"), folder / "adapter", SOURCES[request.param])


def left(cache: Path) -> set[str]:
    """Names of what is in a cache beside the locks."""
    return {path.name for path in cache.rglob("*") if path.is_file() and path.parent.name != LOCKS}


@pytest.mark.parametrize("kib", [4, 8, 12])
def test_prepare(kib: int, source: Path, tmp_path: Path) -> None:
    """The disk becomes full at another file each time."""
    with small_disk(tmp_path / "disk", kib) as disk:
        with pytest.raises(OutputError, match=NO_SPACE):
            prepare_adapter(source, disk / "cache", model=source.parent / "base", dtype="fp32")
        assert left(disk / "cache") == set()
        enlarge(disk, LARGE_KIB)
        assert prepare_adapter(source, disk / "cache", model=source.parent / "base").path.is_dir()


def test_a_refusal_that_cannot_be_written_keeps_its_reason(source: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(source, tmp_path / "broken")
    tensors = broken / "adapter_model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1])
    with small_disk(tmp_path / "disk", 4) as disk:
        (disk / "other").write_bytes(bytes(4096))
        for _ in range(2):
            with pytest.raises(Exception, match="not a complete safetensors file"):
                prepare_adapter(broken, disk / "cache", model=source.parent / "base")
        assert left(disk / "cache") == set()


def test_a_fleet(source: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(source.parent, tmp_path / "copied") / source.name
    with small_disk(tmp_path / "disk", 12) as disk:
        given: dict[str, Any] = {
            "cache": disk / "cache",
            "model": str(source.parent / "base"),
            "html": tmp_path / "page.html",
        }
        report = prepare_fleet([str(source), str(copied)], dtype="fp32", **given)
        assert [row.verdict for row in report.rows] == ["failed", "failed"]
        assert all(NO_SPACE in row.reason for row in report.rows)
        assert left(disk / "cache") == set()
        enlarge(disk, LARGE_KIB)
        assert [row.verdict for row in prepare_fleet([str(source)], **given).rows] == ["prepared"]


def test_the_worker(source: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 12) as disk:
        given = {"cache": str(disk / "cache"), "model": str(source.parent / "base")}
        answer = answer_to({"source": str(source), "dtype": "fp32", **given})
        assert NO_SPACE in answer["refused"]
        assert left(disk / "cache") == set()
        enlarge(disk, LARGE_KIB)
        assert answer_to({"source": str(source), **given})["prepared"]["cached"] is False
