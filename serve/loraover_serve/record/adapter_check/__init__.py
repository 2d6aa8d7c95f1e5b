"""Check that a server answers as an adapter was trained: with the standard library alone.

    python adapter_check.pyz adapter_reference.json.gz http://localhost:8000 --served-name shop

`loraover record` writes the reference; docs/formats.md describes it, and docs/verify.md the rules of the verdict.
Exit code 0: as trained; 1: differs; 3: inconclusive; 2: unusable reference, address or server.
"""
