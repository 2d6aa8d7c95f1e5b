"""Extras of this package, and what to say where a package of theirs is missing."""

from __future__ import annotations

_WITH_TORCH = ("torch", "train", "eval", "export", "lab", "llamacpp", "serve")
_WITH_PEFT = ("export", "train", "eval", "lab", "llamacpp", "serve")
EXTRAS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("torch", "transformers"), _WITH_TORCH),
    "peft": _WITH_PEFT,
    "scipy": ("serve", "lab", "eval"),
    "datasets": ("train", "eval", "lab"),
    **dict.fromkeys(("accelerate", "sentencepiece", "tensorboard", "trl"), ("train", "lab")),
    "lm_eval": ("eval", "lab"),
    **dict.fromkeys(("onnx", "onnxruntime", "onnxruntime_genai", "onnxscript"), ("export",)),
    "gguf": ("llamacpp", "train", "lab"),
    "llama_cpp_py_sync": ("llamacpp",),
    **dict.fromkeys(("OpenSSL", "cryptography", "model_signing"), ("sign",)),
    "prometheus_client": ("watch",),
}
"""Extras that bring a package, by the name that it is imported by; the first is named where no command says which."""

SOURCE = "."
"""Requirement that pip installs: a clone until an index has a release; `python release/by_name.py` changes it."""
INSTALL = f'pip install "{SOURCE}[{{}}]"'
"""Command that installs an extra."""


def install(extra: str) -> str:
    """Return how an extra is installed, in words that messages and `loraover doctor` show."""
    return INSTALL.format(extra) + (" in a clone of LoRA-Over" if SOURCE == "." else "")


def missing_package(error: BaseException, extra: str | None = None) -> str | None:
    """Return what to install, for the command of an extra, after an import that failed; None for any other error."""
    if not isinstance(error, ModuleNotFoundError) or error.name not in EXTRAS:
        return None
    extras = EXTRAS[error.name]
    return f"this needs {error.name}: {install(extra if extra in extras else extras[0])}"
