"""The parts of vLLM that the plug-in uses and mends, in the installed release, and in the sources of another one."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from loraover_serve.plugin.parts import KNOWN, PARTS, Part, is_known, missing

from support.vllm_command import vllm_command

ROOT = Path(__file__).parents[2]
PLUGIN = ROOT / "serve" / "loraover_serve" / "plugin"
READ = "0.33.0"
"""Release whose sources are compared as well, since it has no build for CPUs."""
DOCUMENTED = {"vllm", "vllm.lora.resolver"}
"""Modules that vLLM documents for plug-ins."""


def test_every_import_of_vllm_is_one_of_the_parts() -> None:
    declared = {part.module for part in PARTS} | {f"{part.module}.{part.name.partition('.')[0]}" for part in PARTS}
    found = set()
    for file in PLUGIN.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "vllm":
                found |= {(str(node.module), f"{node.module}.{each.name}") for each in node.names}
    assert len(found) > 10
    assert [name for module, name in found if module not in DOCUMENTED and name not in declared] == []


@pytest.mark.parametrize(
    ("source", "is_there"),
    [
        ("class C:\n    def f(self, a, b=1): ...", True),
        ("class C:\n    async def f(self, a): ...", True),
        ("class C:\n    def f(self, b): ...", False),
        ("class C:\n    f = None", False),
        ("class D:\n    def f(self, a): ...", False),
        ("def f(self, a): ...", False),
    ],
)
def test_a_part_is_found_by_its_class_and_its_parameters(source: str, is_there: bool, tmp_path: Path) -> None:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "m.py").write_text(source)
    found = missing(tmp_path, [Part("vllm.m", "C.f", "is called", ("self", "a"))])
    assert found == ([] if is_there else ["vllm.m.C.f (is called)"])


def test_what_is_assigned_is_found_where_it_is_assigned(tmp_path: Path) -> None:
    (tmp_path / "vllm" / "m").mkdir(parents=True)
    source = "class C:\n    a: int\n    def f(self, state):\n        self.b = 1\n        c = 2\n        state.d = 3\n"
    (tmp_path / "vllm" / "m" / "__init__.py").write_text(f"{source}if True:\n    from x import e\n")
    names = ("C.a", "C.b", "C.c", "C.d", "state.d", "e", "c", "C")
    found = missing(tmp_path, [Part("vllm.m", name, "") for name in names])
    assert [each.removeprefix("vllm.m.").removesuffix(" ()") for each in found] == ["C.c", "C.d", "c"]


@pytest.mark.engine
def test_the_installed_release_has_every_part() -> None:
    packages = vllm_command().parents[1] / "lib"
    (root,) = (path.parent for path in packages.glob("python3*/site-packages/vllm"))
    assert missing(root) == []
    assert len(missing(root.parent)) == len(PARTS)


@pytest.mark.matrix
def test_another_release_has_every_part(tmp_path: Path) -> None:
    assert is_known(READ)
    words = ["pip", "download", f"vllm=={READ}", "--no-deps", "--quiet", "--dest", str(tmp_path)]
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"vLLM {READ} cannot be downloaded: {done.stderr.strip().splitlines()[-1]}")
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path, [name for name in file.namelist() if name.endswith(".py")])
    assert missing(tmp_path) == []


BEHAVIOUR = """
import asyncio, sys, time
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import torch
import vllm
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.lora.ops.torch_ops import lora_ops
from vllm.lora.punica_wrapper import punica_cpu
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import WorkerLoRAManager
from vllm.v1.worker.gpu_input_batch import InputBatch
from loraover_serve.plugin import mends
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest
from loraover_serve.plugin import routes
from loraover_serve.plugin.routes import serve_anew, served_by, used_by

one, two = (LoRARequest("shop", number, f"/{number}") for number in (1, 2))
batch = SimpleNamespace(
    request_lora_mapping=np.array([1, 2]), num_reqs=2, lora_id_to_lora_request={1: one, 2: two}
)
active = lambda: len(InputBatch.make_lora_inputs(batch, np.array([1, 1]), np.array([1, 1]))[2])

def rows():
    # A base row, and one of each of two adapters: prefill, decode and the head, each into a slice or the whole.
    inputs, weights, found = torch.ones(3, 2), torch.tensor([1.0, 10.0]).view(2, 1, 1, 1).expand(2, 1, 3, 2), []
    each, lengths = torch.tensor([-1, 0, 1]), torch.ones(3, dtype=torch.long)
    for call in (
        lambda y: lora_ops.sgmv_expand(inputs, weights, y, None, lengths, each, 3, 1, 3, True),
        lambda y: lora_ops.sgmv_expand_slice(inputs, weights, y, None, lengths, each, 3, 1, 3, 0, 3, True),
        lambda y: punica_cpu.bgmv_expand(inputs, weights, y, each, add_inputs=True),
        lambda y: punica_cpu.bgmv_expand_slice(inputs, weights, y, each, 0, 3, True),
    ):
        output = torch.full((3, 3), 5.0)
        call(output)
        found.append(output[:, 0].tolist())
    return found[0] if all(each == found[0] for each in found) else found

print("stock", active(), rows())
version, vllm.__version__ = vllm.__version__, "0.99.1"
cache = Path(sys.argv[1])
mends.mend(cache)
print("unknown", active(), rows())
vllm.__version__ = version
loaded = []
WorkerLoRAManager._load_adapter = lambda manager, request: loaded.append(mends.is_whole(Path(request.lora_path)))
mends.AGAIN_S = 1.0
mends.mend.cache_clear()
mends.mend(cache)
print("mended", active(), rows(), one == LoRARequest("shop", 1, "/other"))
begun = time.monotonic()
for folder in (cache.parent / "elsewhere", cache / "digest" / "adapter"):
    WorkerLoRAManager._load_adapter(None, LoRARequest("shop", 1, str(folder)))
    print("waited", round(time.monotonic() - begun))
print(loaded)

added = []
async def add_lora(request): added.append((request.lora_int_id, request.lora_path))
states = {"a": SimpleNamespace(lora_request=one), "b": SimpleNamespace(lora_request=None)}
processor = SimpleNamespace(request_states=states)
client = SimpleNamespace(
    model_config=None, renderer=None, input_processor=None, add_lora=add_lora, output_processor=processor
)
async def reload():
    models = OpenAIServingModels(client, [])
    print(await serve_anew(models, "shop", "/1"))
    models.lora_requests["shop"] = LoRARequest("shop", models.lora_id_counter.inc(1), "/1", load_inplace=True)
    print(await serve_anew(models, "shop", "/1"), await serve_anew(models, "shop", "/2"), added, served_by(models))
    found = models.lora_requests["shop"]
    print(found.lora_int_id, found.load_inplace, models.lora_resolver_lock["shop"].locked(), sorted(used_by(models)))
asyncio.run(reload())

class Prepared:
    # It prepares at once, and its first looks at changed folders fail.
    settings, looks = SimpleNamespace(source_of=lambda path: {"source": path}, reload=False), 0
    renew = prepare = staticmethod(lambda name, source=None: asyncio.sleep(0, {"path": str(source)}))
    def let_go(self, used): self.gone = sorted(used)
    def changed(self, served):
        self.looks += 1
        if self.looks < 3:
            raise PermissionError("a look fails")
        return {"shop": "/3"}
routes.service = lambda found=Prepared(): found
routes.LOOK_S = routes.RETRY_S = 0.01

async def load():
    models = OpenAIServingModels(client, [])
    models.lora_requests["shop"] = LoRARequest("shop", 7, "/1")
    raw = SimpleNamespace(app=SimpleNamespace(state=SimpleNamespace(openai_serving_models=models)))
    body = LoadLoRAAdapterRequest(lora_name="shop", lora_path="/2", load_inplace=True)
    await models.lora_resolver_lock["shop"].acquire()
    loading = asyncio.create_task(routes.load_adapter(body, raw))
    await asyncio.sleep(0.05)
    del models.lora_requests["shop"]  # as vLLM's own route does with this lock
    models.lora_resolver_lock["shop"].release()
    print((await loading).status_code, served_by(models))
    keeping = asyncio.create_task(routes.keep_current(routes.service(), models))
    await asyncio.sleep(0.5)
    print(keeping.done(), routes.service().looks > 3, routes.service().gone, served_by(models))
    keeping.cancel()
asyncio.run(load())
"""


@pytest.mark.matrix
@pytest.mark.engine
def test_the_parts_of_the_installed_release_do_what_the_plug_in_expects(tmp_path: Path) -> None:
    """A known release is mended, and an unknown one is left alone, with a warning of what it lacks."""
    python = vllm_command().with_name("python")
    path = os.pathsep.join([str(ROOT), str(ROOT / "export"), str(ROOT / "serve")])
    done = subprocess.run(
        [str(python), "-c", BEHAVIOUR, str(tmp_path / "cache")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert f"vLLM 0.99.1 is not one of {', '.join(KNOWN)}, so its faults are not fixed" in said
    assert "it has all parts that the plug-in needs, but they were never run with it" in said
    assert "are missing; it is loaded when they have been prepared again" in said
    assert "the served adapters cannot be checked for changes" in said
    assert done.stdout.splitlines()[-11:] == [
        "stock 1 [25.0, 7.0, 25.0]",
        "unknown 1 [25.0, 7.0, 25.0]",
        "mended 2 [5.0, 7.0, 25.0] True",
        "waited 0",
        "waited 1",
        "[False, False]",
        "False",
        "False True [(2, '/2')] {'shop': '/2'}",
        "2 False False ['/1', '/2']",
        "200 {'shop': '/2'}",
        "False True ['/1', '/2'] {'shop': '/2'}",
    ]
