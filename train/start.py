"""Start the trainer by path: `python <pack>/train/start.py fit ...` does what `python -m train fit ...` does in the
pack's root.

An embedded Python (ComfyUI's portable Windows build) ignores PYTHONPATH and the current folder, and a launcher such as
`accelerate launch` starts scripts; by path both find the pack, whatever its folder is called.
"""

import runpy
import sys
from pathlib import Path


def main() -> None:
    """Put the pack's root in the place of this script's own folder, whose modules are not top level, and go."""
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(entry for entry in sys.path if not entry or Path(entry).resolve() != here)]
    runpy.run_module("train", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
