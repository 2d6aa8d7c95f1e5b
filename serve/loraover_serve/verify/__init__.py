"""Verification of engines by PyTorch or by references, which this room records, and its reports."""
