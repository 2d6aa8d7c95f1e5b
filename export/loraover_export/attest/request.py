"""Arguments of an attestation, checked before any file is read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from loraover.adapters.uniform.request_fields import replaces
from loraover.common.request import AnyPath, Request, argument, option


@dataclass(frozen=True)
class AttestRequest(Request):
    """Write a statement of ADAPTER's files and of the checks that they passed, or compare the files with it.

    The statement has in-toto's form, and is attestation.json in the adapter's folder: the SHA-256 of each file, the
    verdicts of the certificates, and the SHA-256 of the certificates and of the reference. Each certificate has to name
    the SHA-256 of the files beside it. With a key, the whole folder is signed with it by OpenSSF's package
    model-signing, to model.sig.

    Exit code 1: with --check, a file or the signature is not as attested; else, a certificate has failed.
    """

    verb = "loraover export attest"
    examples = (
        "loraover export attest folded",
        "loraover export attest for-vllm --private-key signing.pem",
        "loraover export attest for-vllm --check --public-key signing.pub",
    )

    adapter: AnyPath = argument("Folder of an adapter that an export wrote.")
    check: bool = option("Compare the files with the statement that the folder holds.", default=False)
    private_key: AnyPath | None = option(
        "PEM file of an elliptic-curve key to sign the folder with.", default=None, default_text="no signature"
    )
    password_variable: str | None = option(
        "Environment variable that holds the password of the private key.", default=None, needs="private_key"
    )
    public_key: AnyPath | None = option(
        "PEM file of the public key to verify the signature with.",
        default=None,
        default_text="the signature is not verified",
        needs="check",
    )
    force: bool = replaces("attestation")

    def faults(self) -> Iterator[str]:
        if self.check and (given := self.given("private_key", "force")):
            yield f"{given}: {self.named('check')} writes nothing; leave one of them out."
        if self.password_variable is not None and self.password_variable not in os.environ:
            yield f"{self.named('password_variable')}: {self.password_variable} is not set; give the variable's name."
