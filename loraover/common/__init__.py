"""Code that every room uses: errors, exit codes, atomic output, strict JSON, HTTP, versions."""
