"""Makes what ships with the pack for a first run: the toy in fp8, and the two adapters of a demo in bfloat16.

    python -m demo.ship demo_results

Half the size of the toy's own file; what it draws is read as well (`python -m demo.evaluate --weights FILE`).
"""

import argparse
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .concepts import CONTENT, STYLE
from .model import WEIGHTS
from .toy.files import BASE, FOLDER


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="the folder of a demo, with its two adapters")
    args = parser.parse_args()
    rewrite(WEIGHTS, BASE, torch.float8_e4m3fn)
    for concept in (CONTENT, STYLE):
        name = f"{concept.name}.safetensors"
        rewrite(args.results / name, FOLDER / name, torch.bfloat16)
    for path in sorted(FOLDER.glob("*.safetensors")):
        print(f"{path.stat().st_size / 1e6:5.2f} MB  {path}")


def rewrite(source: Path, target: Path, matrices: torch.dtype) -> None:
    """The same file with its matrices in another type; what has fewer dimensions, and the metadata, stay.

    float8_e4m3fn holds the toy's weights without a scale.
    """
    with safe_open(source, "pt") as file:
        metadata = file.metadata()
    state = {key: tensor.to(matrices) if tensor.dim() == 2 else tensor for key, tensor in load_file(source).items()}
    save_file(state, target, metadata)


if __name__ == "__main__":
    main()
