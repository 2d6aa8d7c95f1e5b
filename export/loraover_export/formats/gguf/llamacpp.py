"""llama.cpp in this process, for the logits of a GGUF model with an adapter or without one.

The library is the one that the wheel `llama-cpp-py-sync` carries. An error in a file can abort the process inside of
libllama, so the headers are compared before libllama opens the files.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from loraover.common.errors import EngineError
from loraover_export.formats.gguf.header import GgufHeader, read_header

TOKEN_EMBEDDING, HEAD = "token_embd.weight", "output.weight"
AT_ONCE = 512
"""Tokens that llama.cpp computes in one step; it splits longer prompts."""
GGML_F32 = 0
ERROR_LEVEL, CONTINUED = 4, 5


class LlamaCppModel:
    """A GGUF model in llama.cpp on the CPU, with at most one adapter.

    Keys, values and logits are float32. Use it as a context manager, or call `close`.

    Args:
        base: GGUF file of the base model.
        adapter: GGUF file of an adapter; None runs the base model.
        threads: Number of threads; None means one for each core.

    Raises:
        ModuleNotFoundError: llama-cpp-py-sync is not installed.
        EngineError: llama.cpp cannot load a file, or the adapter is for another model.
    """

    def __init__(self, base: Path, adapter: Path | None = None, threads: int | None = None) -> None:
        check_pair(base, adapter)
        self._ffi, self._lib = load_library()
        self._threads = threads or os.cpu_count() or 1
        self._base = base
        self._close = ExitStack()
        with self._reported(f"{base}: llama.cpp cannot load the model"):
            options = self._lib.llama_model_default_params()
            options.n_gpu_layers = 0
            self._model = self._lib.llama_model_load_from_file(os.fsencode(base), options)
            _require(self._model != self._ffi.NULL)
        self._close.callback(self._lib.llama_model_free, self._model)
        self._adapter = None
        if adapter is not None:
            try:
                with self._reported(f"{adapter}: llama.cpp cannot load the adapter"):
                    self._adapter = self._lib.llama_adapter_lora_init(self._model, os.fsencode(adapter))
                    _require(self._adapter != self._ffi.NULL)
            except EngineError:
                self.close()
                raise

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""
        return int(self._lib.llama_vocab_n_tokens(self._lib.llama_model_get_vocab(self._model)))

    def logits(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Run a prompt, and return the logits after each of its tokens, (tokens, vocabulary).

        Raises:
            EngineError: No tokens, a token outside of the vocabulary, or an error of llama.cpp.
        """
        with self._run(tokens, len(tokens)) as context:
            return self._decode(context, tokens, 0)

    def greedy(self, tokens: Sequence[int], new_tokens: int) -> tuple[int, ...]:
        """Generate the likeliest tokens after a prompt, one at a time through the cache, past any end of the text.

        Raises:
            EngineError: No tokens, a token outside of the vocabulary, or an error of llama.cpp.
        """
        with self._run(tokens, len(tokens) + new_tokens) as context:
            read = list(tokens)
            found: list[int] = []
            for _ in range(new_tokens):
                found.append(int(self._decode(context, read, len(tokens) + len(found) - len(read))[-1].argmax()))
                read = found[-1:]
            return tuple(found)

    @contextmanager
    def _run(self, tokens: Sequence[int], room: int) -> Iterator[Any]:
        """Open a context for a number of tokens during a block, and turn any failure in it into a clear error."""
        wrong = [token for token in tokens if not 0 <= token < self.vocabulary]
        if wrong or not tokens:
            found = f"token {wrong[0]}" if wrong else "no token"
            raise EngineError(f"{self._base}: found {found}, expected tokens from 0 to {self.vocabulary - 1}.")
        with ExitStack() as stack, self._reported(f"{self._base}: llama.cpp cannot run a prompt of {room} tokens"):
            options = self._lib.llama_context_default_params()
            options.n_ctx = options.n_batch = options.n_outputs_max = options.n_outputs_max_per_seq = room
            options.n_ubatch = min(room, AT_ONCE)
            options.n_threads = options.n_threads_batch = self._threads
            options.type_k = options.type_v = GGML_F32
            options.flash_attn_type = self._lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
            context = self._lib.llama_init_from_model(self._model, options)
            _require(context != self._ffi.NULL)
            stack.callback(self._lib.llama_free, context)
            if self._adapter is not None:
                adapters, scales = self._ffi.new("struct llama_adapter_lora *[]", [self._adapter]), [1.0]
                _require(self._lib.llama_set_adapters_lora(context, adapters, 1, self._ffi.new("float[]", scales)) == 0)
            yield context

    def _decode(self, context: Any, tokens: Sequence[int], start: int) -> npt.NDArray[np.float32]:
        """Run tokens that follow `start` others, and return the logits after each."""
        batch = self._lib.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for i, token in enumerate(tokens):
                batch.token[i], batch.pos[i], batch.logits[i] = token, start + i, 1
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            _require(self._lib.llama_decode(context, batch) == 0)
        finally:
            self._lib.llama_batch_free(batch)
        found = self._lib.llama_get_logits(context)
        _require(found != self._ffi.NULL)
        shape = (len(tokens), self.vocabulary)
        raw = self._ffi.buffer(found, shape[0] * shape[1] * 4)
        return np.frombuffer(raw, dtype=np.float32).reshape(shape).copy()

    @contextmanager
    def _reported(self, what: str) -> Iterator[None]:
        """Turn a failed call into an EngineError with the lines that libllama logged."""
        _LOGGED.clear()
        try:
            yield
        except _FailedError:
            reason = "; ".join(line for line in "".join(_LOGGED).splitlines() if line.strip())
            raise EngineError(f"{what}: {reason or 'it gives no reason'}.") from None

    def close(self) -> None:
        """Free the model and its adapter; further calls do nothing."""
        self._close.close()

    def __enter__(self) -> LlamaCppModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def check_pair(base: Path, adapter: Path | None) -> None:
    """Compare the headers of a base model and an adapter.

    Raises:
        EngineError: A file is damaged, is of another kind, or the adapter is for another model.
    """
    model = read_header(base)
    if model.is_adapter or not model.architecture:
        raise EngineError(f"{base}: holds {'an adapter' if model.is_adapter else 'no model'}, expected a GGUF model.")
    parts = model.fields.get("split.count", 1)
    if parts not in (0, 1):
        raise EngineError(f"{base}: is one of {parts} parts; merge them with llama-gguf-split --merge first.")
    if adapter is not None:
        _check_adapter(model, read_header(adapter))


def _check_adapter(model: GgufHeader, adapter: GgufHeader) -> None:
    if not adapter.is_adapter or adapter.fields.get("adapter.type") != "lora":
        raise EngineError(f"{adapter.path}: holds no LoRA adapter, expected general.type adapter, adapter.type lora.")
    if adapter.architecture != model.architecture:
        raise EngineError(
            f"{adapter.path}: is for the architecture {adapter.architecture!r}, but {model.path} is of "
            f"{model.architecture!r}; name the model that the adapter was trained on."
        )
    for name in adapter.tensors:
        target, _, kind = name.rpartition(".")
        pair = [adapter.tensors.get(f"{target}.lora_{side}") for side in "ab"]
        weight = model.tensors.get(target)
        if kind not in ("lora_a", "lora_b") or pair[0] is None or pair[1] is None:
            raise EngineError(f"{adapter.path}: {name} is not one of a pair of lora_a and lora_b.")
        if weight is None:
            raise EngineError(f"{adapter.path}: adapts {target}, which {model.path} does not have.")
        if target == TOKEN_EMBEDDING and HEAD not in model.tensors:
            raise EngineError(
                f"{adapter.path}: adapts {target}, which is also the head of {model.path}; llama.cpp would stop there."
            )
        a, b, sizes = pair[0].shape, pair[1].shape, weight.shape
        fits = len(a) == len(b) == len(sizes) in (2, 3) and a[:-2] == b[:-2] == sizes[:-2]  # experts stand in front
        if fits and target == TOKEN_EMBEDDING:  # A (tokens, r) and B (dimension, r)
            fits = (a[-2], b[-2]) == sizes and a[-1] == b[-1]
        elif fits:  # A (r, in) and B (out, r)
            fits = (b[-2], a[-1]) == sizes[-2:] and a[-2] == b[-1]
        if not fits:
            raise EngineError(
                f"{adapter.path}: {target} has A {a} and B {b}, which do not fit {sizes} of {model.path}; name the "
                "model that the adapter was trained on."
            )


class _FailedError(Exception):
    """A call of libllama that returned an error."""


def _require(succeeded: bool) -> None:
    if not succeeded:
        raise _FailedError


_LOGGED: list[str] = []
_LOADED: list[Any] = []
"""The binding, the library and the callback that receives its log; libllama logs for the whole process."""


def load_library() -> tuple[Any, Any]:
    """Load libllama once for the process, and return its binding (cffi) and the library."""
    if not _LOADED:
        from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

        try:
            ffi, library = get_ffi(), get_lib()
        except (RuntimeError, OSError) as error:
            raise EngineError(f"llama.cpp: the library of llama-cpp-py-sync cannot be loaded: {error}") from error
        is_error = [False]

        def log(level: int, text: Any, data: Any) -> None:
            is_error[0] = level == ERROR_LEVEL or (level == CONTINUED and is_error[0])
            if is_error[0]:
                _LOGGED.append(ffi.string(text).decode("utf-8", errors="replace"))

        callback = ffi.callback("void(enum ggml_log_level, const char *, void *)", log)
        library.llama_log_set(callback, ffi.NULL)
        library.llama_backend_init()
        _LOADED.extend((ffi, library, callback))
    return _LOADED[0], _LOADED[1]
