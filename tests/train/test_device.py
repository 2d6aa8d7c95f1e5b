"""The device that a model is loaded to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loraover.common.errors import ConfigError
from loraover.models.device import choose_device, found_devices
from loraover.models.load import load_model, resolve_model

from support.devices import ALL_DEVICES
from support.tiny_models import tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("device")
    tiny_llama().save_pretrained(folder)
    return folder


def machine(monkeypatch: pytest.MonkeyPatch, cuda: int = 0, mps: bool = False) -> None:
    """Pretend that PyTorch finds these devices."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(
    ("found", "name", "expected"),
    [
        ({}, "auto", "cpu"),
        ({"mps": True}, "auto", "mps"),
        ({"cuda": 1, "mps": True}, "auto", "cuda"),
        ({"cuda": 2}, "cuda", "cuda"),
        ({"cuda": 2}, "cuda:1", "cuda:1"),
        ({"cuda": 2}, "cpu", "cpu"),
    ],
)
def test_a_device_that_is_there_is_chosen(
    found: dict[str, Any], name: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, **found)
    assert choose_device(name) == torch.device(expected)


@pytest.mark.parametrize(
    ("found", "name", "finds"),
    [
        ({}, "cuda", "finds cpu only"),
        ({}, "mps", "finds cpu only"),
        ({"mps": True}, "cuda:0", "finds cpu, mps"),
        ({"cuda": 2}, "cuda:2", "finds cpu, 2 of cuda"),
    ],
)
def test_a_device_that_is_not_there_is_refused_with_those_that_are(
    found: dict[str, Any], name: str, finds: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, **found)
    with pytest.raises(ConfigError, match=f"there is no {name} here.*{finds}.*or auto"):
        choose_device(name)


@pytest.mark.parametrize("name", ["gpu", "", "cuda:", "cuda:-1", "cuda:²", "cuda:01", "cpu:0", "mps:0", "meta"])
def test_an_unknown_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="expected one of auto, cpu, cuda, mps, or one GPU such as cuda:1"):
        choose_device(name)


@pytest.mark.parametrize("device", ALL_DEVICES)
def test_a_model_is_loaded_to_the_device(device: str, model: Path) -> None:
    source = resolve_model(str(model))
    loaded = load_model(source, device=device)
    assert {tensor.device.type for tensor in (*loaded.parameters(), *loaded.buffers())} == {device}
    assert loaded(input_ids=torch.arange(4, device=device)[None]).logits.device.type == device


def test_a_model_goes_straight_to_its_device(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    given: dict[str, Any] = {}

    def note(*args: Any, **kwargs: Any) -> torch.nn.Module:
        given.update(kwargs)
        return torch.nn.Identity()

    machine(monkeypatch, cuda=2)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", note)
    load_model(resolve_model(str(model)), device="cuda:1", dtype="fp64")
    assert given["device_map"] == {"": torch.device("cuda:1")}
    assert given["dtype"] is torch.float64


def test_this_machine_has_a_processor() -> None:
    assert found_devices()["cpu"] == 1
