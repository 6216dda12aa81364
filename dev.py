"""One command for each thing a newcomer wants to do. Standard library only; makes its own environment in .venv.

python dev.py test [pytest arguments]    lint, types and every test that this machine can run (COMFYUI_PATH: a ComfyUI)
python dev.py test --quick               lint, types and the tests that start no process and train little, a minute
python dev.py demo [--no-wait]           a toy FLUX: train a content and a style on one picture each, merge, look
python dev.py demo --golden              the merge against the published code's numbers, as a table
"""

import argparse
import hashlib
import os
import subprocess
import sys
import urllib.error
import urllib.request
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
ENVIRONMENT = ROOT / ".venv"
REQUIREMENTS = ROOT / "tests" / "requirements.txt"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PYTHONS = ((3, 10), (3, 13))  # what the pinned torch has builds for


def main() -> int:
    """Run one command; the exit code is that of the first stage that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["test", "demo"])
    args, rest = parser.parse_known_args()
    if not PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]:
        print(f"dev.py: this is Python {sys.version.split()[0]}; the pinned torch needs 3.10 to 3.13", file=sys.stderr)
        return 2
    python = prepared_python()
    if args.command == "demo":
        golden = "--golden" in rest
        module = "demo.golden" if golden else "demo.story"
        return run([python, "-m", module, *(part for part in rest if part != "--golden")])
    stages = [
        [python, "-m", "ruff", "check", "."],
        [python, "-m", "ruff", "format", "--check", "."],
        [
            python,
            "-m",
            "mypy",
            *(
                part
                for name in ("qrlora_core", "qrlora_plots", "train")
                if (ROOT / name).is_dir()
                for part in ("-p", name)
            ),
        ],
        [python, str(ROOT / "tests" / "mypy_nodes.py")],
        [python, "-m", "pytest", "-rs", "--durations=25", *(rest if named(rest) else [*side_by_side(), *rest])],
    ]
    codes = [run(stage) for stage in stages]
    return next((code for code in codes if code), 0)


def named(arguments: list[str]) -> bool:
    """Whether these arguments ask for some of the tests, which start sooner in one process."""
    return any(argument != "--quick" for argument in arguments)


def side_by_side() -> list[str]:
    """pytest's arguments for as many processes as there are cores, up to four; each computes on its share of them."""
    cores = os.cpu_count() or 1
    processes = min(cores, 4)
    if processes == 1:
        return []
    os.environ.setdefault("OMP_NUM_THREADS", str(cores // processes))
    return [f"--numprocesses={processes}", "--dist=loadscope", "--no-loadscope-reorder"]


def prepared_python() -> str:
    """The interpreter of `.venv`, made or brought up to date when the list of requirements has changed."""
    python = ENVIRONMENT / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp = ENVIRONMENT / "requirements.sha256"
    wanted = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()
    if python.is_file() and stamp.is_file() and stamp.read_text() == wanted:
        return str(python)
    print(f"dev.py: preparing {ENVIRONMENT.name} (once; some minutes)", flush=True)
    venv.create(ENVIRONMENT, with_pip=True, clear=True)
    lines = [line.strip() for line in REQUIREMENTS.read_text().splitlines()]
    torch = next(line for line in lines if line.startswith("torch=="))
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # torch first and alone: PyPI's Linux build of it pulls several GB of CUDA that no test needs
    subprocess.run([*pip, torch, *cpu_index()], check=True)
    subprocess.run([*pip, "-r", str(REQUIREMENTS)], check=True)
    stamp.write_text(wanted)
    return str(python)


def cpu_index() -> list[str]:
    """pip's arguments for PyTorch's own index of CPU builds, where it matters and where it answers."""
    if not sys.platform.startswith("linux"):
        return []
    try:
        with urllib.request.urlopen(f"{TORCH_CPU_INDEX}/torch/", timeout=3):
            return ["--index-url", TORCH_CPU_INDEX]
    except (urllib.error.URLError, OSError):
        return []


def run(command: list[str]) -> int:
    """Run one stage from the pack's root and say how it ended."""
    title = " ".join(Path(part).name if part == command[0] else part for part in command)
    print(f"\n== {title}", flush=True)
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    print(f"== {title}: {'ok' if code == 0 else f'failed ({code})'}", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
