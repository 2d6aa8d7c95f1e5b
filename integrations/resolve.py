"""Which versions pip finds for each training framework beside LoRA-Over: python integrations/resolve.py [NAME...].

A dry run installs nothing, and ignores what is installed. The result is kept in integrations/versions.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
KEPT = Path(__file__).parent / "versions.json"
BESIDE = {
    "axolotl": "loraover[train]",
    "llamafactory==0.9.5": "loraover torch==2.11.0 torchaudio==2.11.0",
    "llamafactory": "loraover[train]",
    "torchtitan": "loraover[train]",
    "torchtune": "loraover[train]",
    "trl": "loraover[train]",
    "unsloth": "loraover[train]",
}
"""What each framework is installed with; LLaMA-Factory 0.9.5 has an older TRL than the extra `train`."""
SHOWN = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "bitsandbytes", "huggingface-hub")
SHOWN += ("torchaudio",)


def resolve(framework: str, reports: Path) -> dict[str, Any]:
    """Return what pip finds for a framework; a report that is already in the folder is read again."""
    report = reports / f"{framework}.json"
    if not report.is_file():
        wanted = [framework, *BESIDE[framework].replace("loraover", str(ROOT)).split()]
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        done = subprocess.run([*command, "--report", report, *wanted], capture_output=True, text=True, check=False)
        if done.returncode:
            return {"beside": BESIDE[framework], "resolves": False, "reason": done.stderr.strip().splitlines()[-1]}
    installed = json.loads(report.read_text())["install"]
    found = {one["metadata"]["name"].lower().replace("_", "-"): one["metadata"]["version"] for one in installed}
    name = framework.partition("=")[0]
    return {
        "beside": BESIDE[framework],
        "resolves": True,
        "packages": len(found),
        "versions": {one: found[one] for one in (name, *SHOWN) if one in found},
    }


def main() -> None:
    """Resolve the frameworks that are named, or all of them, and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*BESIDE, []], help="frameworks; all by default")
    parser.add_argument("--reports", type=Path, help="folder to keep pip's reports in")
    asked = parser.parse_args()
    kept = json.loads(KEPT.read_text()) if KEPT.is_file() else {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in asked.names or BESIDE:
            kept[name] = resolve(name, asked.reports or Path(scratch)) | {
                "python": platform.python_version(),
                "date": datetime.now(UTC).date().isoformat(),
            }
    KEPT.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
