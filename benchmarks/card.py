"""Everything that a graphics card decides, in one table: times, peak memory, errors. On a processor it runs too.

    COMFYUI_PATH=... <ComfyUI's python> -m benchmarks.card --model flux1-dev-fp8.safetensors
    COMFYUI_PATH=... <ComfyUI's python> -m benchmarks.card --real          a generated file of FLUX.1-dev's size, fp8
    COMFYUI_PATH=... <ComfyUI's python> -m benchmarks.card                 a small generated model

Runs, on one base model: load, merge and apply in each mode, a step in each, turning alpha, a sweep, a residual, a hook,
and 20 training steps in each storage; and prints what each took, with the card's name. Errors are those of one step
against the same step on weights and updates in float32 (small models only: FLUX.1 in float32 takes 48 GB).
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.apply import evaluate, load
from benchmarks.comfy import FLUX_1, ROOT, peak, resident, size_arguments, start_host, write_adapter, write_flux

KINDS = ("double_blocks.", "single_blocks.")
STORAGES = ("bf16", "fp8", "int8", "nf4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size_arguments(parser)
    parser.add_argument("--model", type=Path, help="a FLUX.1 safetensors file of your own")
    parser.add_argument("--latent", type=int, default=16, help="side of the latents: 128 is a picture of 1024 pixels")
    parser.add_argument("--train-steps", type=int, default=20)
    parser.add_argument("--storages", nargs="*", default=list(STORAGES), help="of the trainings; none: no training")
    parser.add_argument("--folder", type=Path, help="where files go (default: a temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        failed = [row["what"] for row in run(args, Path(folder)) if "failed" in row]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


class Table:
    """Rows of what was measured."""

    def __init__(self, cuda: Any) -> None:
        self._cuda = cuda
        self.rows: list[dict[str, Any]] = []

    @contextmanager
    def row(self, name: str) -> Iterator[dict[str, Any]]:
        """Measure what happens inside; notes can be put into the row. A failure is a row as well."""
        gc.collect()
        before, found = resident(), {"what": name}
        peak(reset=True)
        if self._cuda is not None:
            self._cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        try:
            yield found
        except Exception as error:  # noqa: BLE001 - one failed way must not hide the others; it is printed as failed
            found["failed"] = f"{type(error).__name__}: {error}".split("\n")[0][:120]
        if self._cuda is not None:
            self._cuda.synchronize()
            found["vram"] = self._cuda.max_memory_allocated() / 1e9
        found["seconds"] = time.perf_counter() - start
        found["ram"] = max(resident() - before, 0.0) / 1e3
        self.rows.append(found)
        print(line(found), flush=True)


def line(row: dict[str, Any]) -> str:
    """One row as text."""
    parts = [f"{row['what']:<34}", f"{row['seconds']:9.3f} s"]
    parts += [f"VRAM {row['vram']:6.2f} GB"] if "vram" in row else []
    parts += [f"RAM +{row['ram']:.2f} GB"]
    parts += [f"error {row['error']:.2e}"] if "error" in row else []
    parts += [f"FAILED {row['failed']}"] if "failed" in row else []
    return "  ".join([*parts, row.get("note", "")]).rstrip()


def run(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """All measurements; the rows."""
    start_host(folder)
    import comfy.hooks
    import comfy.sd
    import torch
    from pack import qrlora_core as core
    from pack.nodes.host.application import apply_recipe
    from pack.nodes.host.hooks import DeltaRHook

    from benchmarks.common import machine

    cuda = torch.cuda if torch.cuda.is_available() else None
    print(machine())
    size = FLUX_1 if args.real else (args.double, args.single, args.hidden)
    file = args.model or write_flux(folder / "flux.safetensors", size, torch.float8_e4m3fn)
    if args.model:
        from qrlora_core import TensorFile

        specs = TensorFile(file, skip_other=True).specs
        blocks = [len({key.split(kind)[1].split(".")[0] for key in specs if kind in key}) for kind in KINDS]
        size = (blocks[0], blocks[1], next(s.shape[0] for k, s in specs.items() if k.endswith("img_in.weight")))
    paths = [write_adapter(folder / f"{seed}.safetensors", size, args.rank, seed) for seed in (1, 2)]
    table = Table(cuda)
    with table.row("load the model"):
        model = comfy.sd.load_diffusion_model(str(file))
    with table.row("load two adapters"):
        style, content = (core.MergeRecipe.of(core.open_adapter(path)) for path in paths)
        for adapter in (*style.adapters, *content.adapters):
            adapter.basis_fingerprint  # noqa: B018 - reads all of Q, as the loader's report does
    with table.row("merge"):
        merged = core.merge(style, 0.5, content, 1.0)
        core.merge_report(merged)
    exact = reference(folder, size, merged, args.latent) if size[2] <= 512 else None
    with table.row("step, bare"):
        load(model)
        evaluate(model, args.latent)
    for mode in ("live", "patch"):
        with table.row(f"apply, {mode}"):
            applied = apply_recipe(model, merged, 1.0, None, mode)[0]
        with table.row(f"load to the device, {mode}"):
            load(applied)
        with table.row(f"step, {mode}") as found:
            result = evaluate(applied, args.latent)
            if exact is not None:
                found["error"] = float((result.double().cpu() - exact).norm() / exact.norm())
        with table.row(f"turn alpha to a step, {mode}"):
            turned = core.merge(style, 0.75, content, 1.0)
            core.merge_report(turned)
            applied = apply_recipe(model, turned, 1.0, None, mode)[0]
            load(applied)
            evaluate(applied, args.latent)
    with table.row("sweep of 25, nodes alone"):
        cells = core.sweep(style, "0:1:0.25", content, "0:1:0.25")
        held = [apply_recipe(model, cell.recipe, 1.0, None, "live")[0] for cell in cells]
    del held
    with table.row("residual of one adapter, written") as found:
        residual = write_residual(model, style.adapters[0], folder)
        found["note"] = f"{residual.stat().st_size / 1e9:.2f} GB"
    with table.row("apply with the residual, and load"):
        restored = apply_recipe(model, style, 1.0, core.Residual(residual), "patch")[0]
        load(restored)
    with table.row("hook, registered and applied"):
        hook = DeltaRHook(merged, 1.0)
        group = comfy.hooks.HookGroup()
        group.add(hook)
        plain = model if not model.is_dynamic() else model.get_non_dynamic_delegate()
        hooked = plain.clone()
        hooked.register_all_hook_patches(group, comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model), {})
        load(hooked)
        hooked.apply_hooks(group)
        evaluate(hooked, args.latent)
        hooked.apply_hooks(None)
    del model, restored, hooked, plain, applied
    free()
    for storage in args.storages:
        with table.row(f"{args.train_steps} training steps, {storage}") as found:
            found["note"] = trained(file, folder, storage, args)
    return table.rows


def reference(folder: Path, size: tuple[int, int, int], merged: Any, latent: int) -> Any:
    """One step on the model's own weights plus the exact update, in float32."""
    import comfy.sd
    import comfy.utils
    import torch
    from pack.nodes.host.application import apply_recipe

    state = comfy.utils.load_torch_file(str(folder / "flux.safetensors"))
    wide = {name: weight.float() for name, weight in state.items()}
    model = comfy.sd.load_diffusion_model_state_dict(wide, model_options={"dtype": torch.float32})
    exact = apply_recipe(model, merged, 1.0, None, "patch")[0]
    load(exact)
    return evaluate(exact, latent).double().cpu()


def write_residual(model: Any, adapter: Any, folder: Path) -> Path:
    """The residual file of an adapter's own basis, as the node writes it."""
    from pack import qrlora_core as core
    from pack.nodes.host.places import own_weight, place_layers

    places = place_layers(model, adapter.targets)

    def residual_of(name: str) -> Any:
        weight = own_weight(model, places[name])[0].to(model.load_device)
        basis = core.own_basis(adapter, name, weight, 1.0)
        return core.residual_weight(weight, basis, adapter.layers[name].scaling)

    import torch

    return core.write_residual(folder / "residual.safetensors", adapter.targets, residual_of, dtype=torch.float16)


def trained(file: Path, folder: Path, storage: str, args: argparse.Namespace) -> str:
    """Train on a random picture in a process of its own, as the node does; seconds of a step and its peak memory."""
    data = training_cache(folder, file, args.latent)
    run_dir = folder / f"run-{storage}"
    settings = {
        "model": str(file), "data": str(data), "run_dir": str(run_dir), "steps": args.train_steps, "rank": args.rank,
        "base_storage": storage, "gradient_accumulation": 1, "basis_cache": str(folder / "bases"),
        "checkpoint_every": 0, "memory_check": False,
    }  # fmt: skip
    written, events = folder / "settings.json", run_dir / "events.jsonl"
    written.write_text(json.dumps(settings))
    command = [sys.executable, str(ROOT / "train" / "start.py"), "fit", "--settings", str(written)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, "--events", str(events)], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no output"])[-1])
    steps = [one for text in events.read_text().splitlines() if (one := json.loads(text)).get("event") == "step"]
    middle = sorted(step["seconds"] for step in steps)[len(steps) // 2]
    return f"{middle:.2f} s a step, peak {max(step['peak_memory'] or 0 for step in steps) / 1e9:.2f} GB"


def training_cache(folder: Path, file: Path, latent: int) -> Path:
    """A cache with one picture of random latents."""
    import torch

    import qrlora_core as core

    path = folder / "cache.safetensors"
    if path.is_file():
        return path
    specs = core.TensorFile(file, skip_other=True).specs
    width = next(spec.shape[1] for key, spec in specs.items() if key.endswith("txt_in.weight"))
    pooled = next(spec.shape[1] for key, spec in specs.items() if key.endswith("vector_in.in_layer.weight"))
    picture = core.EncodedPicture(torch.randn(16, latent, latent), None, None)
    text = core.EncodedText(torch.randn(64, width), torch.randn(pooled))
    return core.save_cache(path, [core.CacheItem("random", 0, "a picture")], [picture], [text])


def free() -> None:
    """Take everything off the card, as the Train node does before it starts."""
    import comfy.model_management as management

    management.unload_all_models()
    gc.collect()
    management.soft_empty_cache()


if __name__ == "__main__":
    main()
