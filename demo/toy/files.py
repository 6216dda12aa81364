"""The toy's files that ship with the pack, by name."""

from pathlib import Path

FOLDER = Path(__file__).parent
BASE = FOLDER / "toy_flux_fp8.safetensors"
STYLE = FOLDER / "toy_style.safetensors"
CONTENT = FOLDER / "toy_content.safetensors"
