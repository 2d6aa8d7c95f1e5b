"""Signatures of the files of an adapter's folder, by model-signing of OpenSSF (extra `sign`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from loraover.common.errors import ConfigError, ExportError
from loraover.common.paths import list_folder

SIGNATURE_FILE = "model.sig"
"""The package's own name for it."""

KEYS = "expected an elliptic-curve key (P-256, P-384 or P-521)"


def read_signer(private_key: Path, password: str | None) -> Any:
    """Return model-signing's configuration that signs with the elliptic-curve key in a PEM file."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from model_signing import signing

    raw: Any = None if password is None else password.encode()  # 1.1.1 gives it to a function that takes bytes
    try:
        return signing.Config().use_elliptic_key_signer(private_key=private_key, password=raw)
    except (AttributeError, OSError, TypeError, UnsupportedAlgorithm, ValueError) as error:  # 1.1.1 asks RSA for curves
        raise ConfigError(f"{private_key}: not a private key that can sign, {KEYS}: {error}.") from error


def sign(adapter: Path, signer: Any, new: Mapping[str, str]) -> bytes:
    """Return the signature of a folder's files, to which those of `new` will be added, by their names and contents."""
    signer.set_hashing_config(_hashing())
    try:
        with _signed_files(adapter, new) as folder:
            signature = folder.parent / SIGNATURE_FILE
            signer.sign(folder, signature)
            return signature.read_bytes()
    except (OSError, ValueError) as error:
        raise ExportError(f"{adapter}: cannot be signed: {error}. Nothing was changed there.") from error


def signature_fault(adapter: Path, public_key: Path) -> str | None:
    """Say why the signature of a folder does not hold for the key in a PEM file; None if it does."""
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from model_signing import verifying

    signature = adapter / SIGNATURE_FILE
    if not signature.is_file():
        return f"{SIGNATURE_FILE} is missing"
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    except (AttributeError, OSError, TypeError, UnsupportedAlgorithm, ValueError) as error:  # as in `read_signer`
        raise ConfigError(f"{public_key}: not a public key that can verify, {KEYS}: {error}.") from error
    config.set_hashing_config(_hashing())
    try:
        with _signed_files(adapter) as folder:
            config.verify(folder, signature)
    except (AttributeError, InvalidSignature, LookupError, TypeError, ValueError) as error:  # of any JSON in the file
        return f"{SIGNATURE_FILE}: {error or 'made with another key, or changed'}"
    return None


@contextmanager
def _signed_files(adapter: Path, new: Mapping[str, str] = {}) -> Iterator[Path]:
    """A folder with the adapter's name and links to the files that a signature covers."""
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / adapter.resolve().name
        for name, path in list_folder(adapter).files.items():
            if name not in (SIGNATURE_FILE, *new):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).symlink_to(path.resolve())
        for name, text in new.items():
            (folder / name).write_text(text, encoding="utf-8")
        yield folder


def _hashing() -> Any:
    from model_signing import hashing

    ignored = [SIGNATURE_FILE, ".cache"]  # the signature has their names, by which the package's own command knows them
    return hashing.Config().set_ignored_paths(paths=ignored).set_allow_symlinks(True)
