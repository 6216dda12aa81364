"""Starting to train: cold (the base model is decomposed) against warm (its basis is found), in one run.

    python -m benchmarks.start [--hidden 512 --double 2 --single 4]      a mid-size FLUX
    python -m benchmarks.start --real --device cuda                      FLUX.1-dev's size: writes a 24 GB file first

Times `train.prepare.prepare`: everything from the settings to the moment before the first step.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import machine
from benchmarks.flux import RandomSource
from qrlora_core import CacheItem, EncodedPicture, EncodedText, save_cache
from train.config import FitConfig
from train.events import EventWriter
from train.run.prepare import prepare
from train.run.processes import make_accelerator
from train.run.reporter import Reporter
from train.run.stop import StopWatch
from train.settings import make_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", action="store_true", help="FLUX.1-dev's size")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--double", type=int, default=2)
    parser.add_argument("--single", type=int, default=4)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--storage", default="bf16")
    parser.add_argument("--folder", type=Path, help="where the model is written (default: the temporary folder)")
    args = parser.parse_args()
    sizes = (19, 38, 3072) if args.real else (args.double, args.single, args.hidden)
    print(machine())
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        model = RandomSource(*sizes).write(folder / "model.safetensors")
        picture, text = EncodedPicture(torch.randn(16, 64, 64)), EncodedText(torch.randn(512, 4096), torch.randn(768))
        save_cache(folder / "data.safetensors", [CacheItem("picture", 0)], [picture], [text])
        settings: dict[str, Any] = {"model": str(model), "data": str(folder / "data.safetensors"), "rank": args.rank}
        settings |= {"device": args.device, "base_storage": args.storage, "basis_cache": str(folder / "basis")}
        seconds = {}
        for kind in ("cold", "warm"):
            config = make_config(FitConfig, settings, {"run_dir": str(folder / kind)})
            seconds[kind] = timed(config)
            print(f"{kind}  {seconds[kind]:8.2f} s")
    print(f"ratio warm / cold  {seconds['warm'] / seconds['cold']:.3f}")


def timed(config: FitConfig) -> float:
    accelerator = make_accelerator(config)
    start = time.perf_counter()
    prepare(config, accelerator, Reporter(EventWriter(None), accelerator.device), StopWatch())
    if accelerator.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
