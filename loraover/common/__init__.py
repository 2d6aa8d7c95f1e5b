"""What every room uses: errors, exit codes, whole-or-absent output, strict JSON, HTTP, versions."""
