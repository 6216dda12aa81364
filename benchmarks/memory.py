"""How much memory a training takes on a processor, against what the trainer says beforehand, for every family.

    python -m benchmarks.memory                          models of some hundred MB with random weights; Linux
    python -m benchmarks.memory --offload 1 sdxl krea2   blocks wait on the disk

Each run is a process of its own, as people start it: `check` says what it will take, `fit` takes it. Compared is
the most that the process ever held (its resident set at its highest), Python and its libraries included.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.common import machine
from benchmarks.families import FAMILIES

STEPS = 2
TOLERANCE = 0.1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help=f"of {', '.join(FAMILIES)} (default: all)")
    parser.add_argument("--heads", type=int, default=8, help="the width is 128 times this")
    parser.add_argument("--pixels", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--storage", default="fp32")
    parser.add_argument("--offload", type=float, default=0.0)
    parser.add_argument("--checkpointing", nargs="+", default=["true", "false"], choices=["true", "false"])
    args = parser.parse_args()
    print(machine())
    print(f"{'family':12} {'weights':>8} {'recompute':>9} {'estimated':>10} {'measured':>9} {'ratio':>6}")
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        for name in args.families or FAMILIES:
            for checkpointing in args.checkpointing:
                wrong += measured(name, Path(folder), checkpointing, args)
    return wrong


def measured(name: str, folder: Path, checkpointing: str, args: argparse.Namespace) -> bool:
    """Print one line; whether the estimate is further off than it may be."""
    model = folder / name
    if not model.is_dir():
        FAMILIES[name].write(model, args.heads)
        FAMILIES[name].write_data(model / "data.safetensors", args.pixels)
    settings = model / "settings.json"
    table = {
        "model": str(model), "data": str(model / "data.safetensors"), "run_dir": str(model / checkpointing),
        "rank": args.rank, "steps": STEPS, "gradient_accumulation": 1, "device": "cpu", "precision": "fp32",
        "base_storage": args.storage, "offload": args.offload, "gradient_checkpointing": checkpointing == "true",
        "basis_cache": str(model / "basis"), "memory_check": False,
    }  # fmt: skip
    settings.write_text(json.dumps(table))
    check = [*_trainer(), "check", "--settings", str(settings), "--json"]
    report = json.loads(subprocess.run(check, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    estimate = report["estimate"]["vram"]
    highest = peak([*_trainer(), "fit", "--settings", str(settings)])
    weights = sum(path.stat().st_size for path in (model / FAMILIES[name].network).glob("*.safetensors"))
    ratio = estimate / highest
    print(
        f"{name:12} {weights / 1e6:6.0f} MB {checkpointing:>9} {estimate / 1e6:7.0f} MB {highest / 1e6:6.0f} MB "
        f"{ratio:6.2f}",
        flush=True,
    )
    return abs(ratio - 1) > TOLERANCE


def peak(command: list[str]) -> int:
    """Bytes that a command held at its highest.

    Raises:
        SystemExit: it failed; its last words are shown.
    """
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if status:
            output.seek(0)
            raise SystemExit(output.read()[-2000:])
    return usage.ru_maxrss * 1024


def _trainer() -> list[str]:
    return [sys.executable, "-m", "train"]


if __name__ == "__main__":
    sys.exit(main())
