"""The parts of vLLM that the plug-in relies on, and which of them a release lacks, read from its sources.

vLLM documents its resolvers and the entry points of plug-ins. Everything else may change with any release, so each
such part is named once, here.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

KNOWN = {"0.32": "run on a CPU", "0.33": "read"}
"""Releases of vLLM whose parts are as the plug-in expects, and whether they were run or only read."""


@dataclass(frozen=True)
class Part:
    """A part of vLLM that is not documented.

    Args:
        module: Module that defines it.
        name: Its name there: `function`, `Class`, `Class.attribute`, or `variable.attribute` for one that is assigned.
        use: Use that the plug-in makes of it.
        takes: Names of the parameters that the plug-in passes, in order; empty for a part that is not called.
    """

    module: str
    name: str
    use: str
    takes: tuple[str, ...] = ()


_MODELS = "vllm.entrypoints.openai.models.serving"
_REQUEST = "vllm.lora.request"
_OPS = "vllm.lora.ops.torch_ops.lora_ops"
_ROWS = ("inputs", "lora_b_weights", "output_tensor", "lora_indices_tensor")

PARTS = (
    Part(_REQUEST, "LoRARequest.__eq__", "patched: versions under one name differ", ("self", "value")),
    Part(_REQUEST, "LoRARequest.__hash__", "patched: versions under one name differ", ("self",)),
    *(
        Part(_REQUEST, f"LoRARequest.{name}", "filled in for what is served")
        for name in ("lora_name", "lora_int_id", "lora_path", "base_model_name", "is_3d_lora_weight")
    ),
    Part(
        "vllm.v1.worker.gpu_input_batch",
        "InputBatch.make_lora_inputs",
        "activates the adapters of a batch, which it keeps in a set",
        ("self", "num_scheduled_tokens", "num_sampled_tokens"),
    ),
    Part(_OPS, "bgmv_expand", "patched on a CPU: rows of the base model get nothing", _ROWS),
    Part(_OPS, "bgmv_expand_slice", "patched on a CPU: rows of the base model get nothing", _ROWS),
    Part("vllm.lora.punica_wrapper.punica_cpu", "bgmv_expand", "patched like the function that it imports"),
    Part("vllm.lora.punica_wrapper.punica_cpu", "bgmv_expand_slice", "patched like the function that it imports"),
    Part("vllm.platforms", "current_platform", "says whether vLLM computes on a CPU"),
    Part(
        "vllm.lora.worker_manager",
        "WorkerLoRAManager._load_adapter",
        "patched: waits for a folder of the cache that is made again",
        ("self", "lora_request"),
    ),
    Part(_MODELS, "OpenAIServingModels.lora_requests", "has the served version of each name"),
    Part(_MODELS, "OpenAIServingModels.lora_resolver_lock", "is held while a name gets another version"),
    Part(_MODELS, "OpenAIServingModels.lora_id_counter", "gives each version an id"),
    Part(_MODELS, "OpenAIServingModels.engine_client", "loads a version"),
    Part(_MODELS, "OpenAIServingModels.load_lora_adapter", "loads what was prepared", ("self", "request")),
    Part("vllm.entrypoints.openai.models.api_router", "models", "finds the table of served names", ("request",)),
    Part("vllm.entrypoints.launchers.api_server.app_state", "state.openai_serving_models", "has that table, too"),
    Part("vllm.entrypoints.serve.engine.protocol", "ErrorResponse.error", "says why vLLM loads nothing"),
    *(
        Part("vllm.entrypoints.serve.lora.protocol", f"LoadLoRAAdapterRequest.{name}", "says what to load")
        for name in ("lora_name", "lora_path", "load_inplace", "is_3d_lora_weight")
    ),
    Part("vllm.entrypoints.serve.utils.api_utils", "validate_json_request", "guards the load route", ("raw_request",)),
    Part("vllm.engine.protocol", "EngineClient.add_lora", "loads a version", ("self", "lora_request")),
    Part("vllm.v1.engine.async_llm", "AsyncLLM.model_config", "names the base model and its data type"),
    Part("vllm.config.model", "ModelConfig.model", "names the base model"),
    Part("vllm.config.model", "ModelConfig.dtype", "names the base model's data type"),
    Part("vllm.v1.engine.async_llm", "AsyncLLM.output_processor", "has the running requests"),
    Part("vllm.v1.engine.output_processor", "OutputProcessor.request_states", "has the running requests, by id"),
    Part("vllm.v1.engine.output_processor", "RequestState.lora_request", "names the version that a request runs with"),
    Part("vllm.engine.arg_utils", "EngineArgs.max_lora_rank", "is the largest rank that is served"),
    Part("vllm.envs", "VLLM_ALLOW_RUNTIME_LORA_UPDATING", "allows the load route"),
    Part("vllm.exceptions", "VLLMValidationError", "becomes an answer of status 400 with its text"),
)
"""Every part of vLLM without documentation that the plug-in uses or patches."""


def is_known(version: str) -> bool:
    """Whether a version of vLLM is of a release that was run or read."""
    return ".".join(version.split(".")[:2]) in KNOWN


def missing(root: Path, parts: Sequence[Part] = PARTS) -> list[str]:
    """Return the parts that the sources of vLLM lack, or that take other parameters, each with its use.

    Args:
        root: Folder that holds the folder `vllm`, as site-packages does.
        parts: Parts to look for.
    """
    modules = {part.module: _tree(root, part.module) for part in parts}
    return [
        f"{part.module}.{part.name} ({part.use})"
        for part in parts
        if not any(_fits(found, part) for found in _defined(modules[part.module], part.name))
    ]


def _tree(root: Path, module: str) -> ast.Module:
    place = root.joinpath(*module.split("."))
    file = next((path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()), None)
    return ast.Module([], []) if file is None else ast.parse(file.read_bytes())


def _fits(found: ast.AST, part: Part) -> bool:
    if not part.takes:
        return True
    if not isinstance(found, ast.FunctionDef | ast.AsyncFunctionDef):
        return False
    names = tuple(each.arg for each in (*found.args.posonlyargs, *found.args.args))
    return names[: len(part.takes)] == part.takes


def _defined(tree: ast.Module, name: str) -> Iterator[ast.AST]:
    """Yield the statements of a module that define, import or assign a name."""
    owner, _, attribute = name.rpartition(".")
    if not owner:
        yield from (node for node in _statements(tree.body) if name in _bound(node))
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == owner:
            yield from (each for each in _statements(node.body) if attribute in _bound(each))
            yield from (each for each in ast.walk(node) if f"self.{attribute}" in _bound(each))
        elif name in _bound(node):
            yield node


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements of a body, and of its conditions, but not those of functions and classes in it."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            yield from _statements([*node.body, *node.orelse])


def _bound(node: ast.AST) -> list[str]:
    """Return the names that a statement binds, such as "models" or "self.engine_client"."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [each.asname or each.name for each in node.names]
    if isinstance(node, ast.Assign):
        return [ast.unparse(target) for target in node.targets]
    return [ast.unparse(node.target)] if isinstance(node, ast.AnnAssign) else []
