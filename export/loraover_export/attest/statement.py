"""The statement in the form of in-toto: which files, and which checks they passed.

Sources, below https://github.com/in-toto/attestation/blob/main/spec: v1/statement.md, and the predicate for results of
tests, of which only version 0.1 exists, predicates/test-result.md.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel


class Digest(BaseModel):
    """Digests of a file."""

    model_config = ConfigDict(frozen=True)

    sha256: str = Field(description="SHA-256, in hexadecimal digits", pattern="^[0-9a-f]{64}$")


class Resource(BaseModel):
    """A file."""

    model_config = ConfigDict(frozen=True)

    name: str = Field(description="Path below the adapter's folder")
    digest: Digest = Field(description="Its digests")
    annotations: dict[str, Any] = Field(
        default={},
        description="Contents of a certificate without its lists, or digests of the reference; "
        "checked: false of a file that neither is of",
    )


class TestResult(BaseModel):
    """Results of the checks; a file names the fields as in-toto does."""

    model_config = ConfigDict(frozen=True, populate_by_name=True, alias_generator=to_camel)
    __test__ = False  # for pytest

    result: Literal["PASSED", "WARNED", "FAILED"] = Field(description="The worst of the results")
    configuration: list[Resource] = Field(description="The certificates and the reference, with their SHA-256")
    passed_tests: list[str] = Field(description="Certificates whose verdict is passed")
    warned_tests: list[str] = Field(description="Certificates that could not decide")
    failed_tests: list[str] = Field(description="Certificates whose verdict is failed")


class Statement(BaseModel):
    """Contents of `attestation.json`."""

    model_config = ConfigDict(frozen=True, populate_by_name=True, alias_generator=to_camel)

    type: Literal["https://in-toto.io/Statement/v1"] = Field(default="https://in-toto.io/Statement/v1", alias="_type")
    subject: list[Resource] = Field(description="The adapter's files", min_length=1)
    predicate_type: Literal["https://in-toto.io/attestation/test-result/v0.1"] = Field(
        default="https://in-toto.io/attestation/test-result/v0.1"
    )
    predicate: TestResult = Field(description="Results of the checks")
