"""Signatures of an adapter's folder, by the package model-signing of OpenSSF (`pip install 'loraover[sign]'`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loraover.common.atomic_output import publish_file
from loraover.common.errors import ConfigError

SIGNATURE_FILE = "model.sig"
"""The package's own name for it."""


def read_signer(private_key: Path, password: str | None) -> Any:
    """Read a private key, and return model-signing's configuration that signs with it.

    Args:
        private_key: PEM file of an elliptic-curve key.
        password: Its password; None if it has none.

    Raises:
        ConfigError: A key that cannot be used.
        ModuleNotFoundError: model-signing is not installed.
    """
    from model_signing import signing

    raw: Any = None if password is None else password.encode()  # 1.1.1 gives it to a function that takes bytes
    try:
        return signing.Config().use_elliptic_key_signer(private_key=private_key, password=raw)
    except (OSError, TypeError, ValueError) as error:
        raise ConfigError(f"{private_key}: not a private key that can sign: {error}.") from error


def sign(adapter: Path, signer: Any) -> None:
    """Sign all files of a folder, and write the signature there.

    Args:
        adapter: The folder.
        signer: What `read_signer` returned.

    Raises:
        OutputError: The signature cannot be written.
    """
    folder = adapter.resolve()  # of a relative path, the package would not leave out the signature
    signer.set_hashing_config(_hashing(folder))
    publish_file(folder / SIGNATURE_FILE, lambda draft: signer.sign(folder, draft))


def signature_fault(adapter: Path, public_key: Path) -> str | None:
    """Say why the signature of a folder does not hold; None if it does.

    Args:
        adapter: The folder.
        public_key: PEM file of the public key.

    Raises:
        ConfigError: A key that cannot be used.
        ModuleNotFoundError: model-signing is not installed.
    """
    from cryptography.exceptions import InvalidSignature
    from model_signing import verifying

    folder = adapter.resolve()
    signature = folder / SIGNATURE_FILE
    if not signature.is_file():
        return f"{SIGNATURE_FILE} is missing"
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    except (OSError, TypeError, ValueError) as error:
        raise ConfigError(f"{public_key}: not a public key that can verify: {error}.") from error
    config.set_hashing_config(_hashing(folder))
    try:
        config.verify(folder, signature)
    except (InvalidSignature, KeyError, ValueError) as error:
        return f"{SIGNATURE_FILE}: {error or 'made with another key, or changed'}"
    return None


def _hashing(adapter: Path) -> Any:
    from model_signing import hashing

    return hashing.Config().set_ignored_paths(paths=[adapter / SIGNATURE_FILE])
