"""Just enough of ComfyUI's modules to import nodes/host without a ComfyUI: folders on a disk, no models, no server."""

import sys
import types
from pathlib import Path

import torch


class FolderPaths(types.ModuleType):
    """`folder_paths` over one base folder; the listing is a plain walk."""

    def __init__(self, base: Path) -> None:
        super().__init__("folder_paths")
        self.base, self.models_dir = base, str(base / "models")
        self.folder_names_and_paths = {}
        self.filename_list_cache = {}
        for kind in ("diffusion_models", "checkpoints", "qrlora"):
            (base / "models" / kind).mkdir(parents=True)
            self.folder_names_and_paths[kind] = ([str(base / "models" / kind)], set())
        for name in ("input", "output"):
            (base / name).mkdir()

    def get_folder_paths(self, kind):
        return list(self.folder_names_and_paths[kind][0])

    def add_model_folder_path(self, kind, path, is_default=False):
        paths, _ = self.folder_names_and_paths.setdefault(kind, ([], set()))
        if path in paths:
            paths.remove(path) if is_default else None
        if path not in paths:
            paths.insert(0 if is_default else len(paths), path)

    def get_filename_list(self, kind):
        roots = map(Path, self.get_folder_paths(kind))
        return sorted({str(path.relative_to(root)) for root in roots for path in root.rglob("*") if path.is_file()})

    def get_input_directory(self):
        return str(self.base / "input")

    def get_output_directory(self):
        return str(self.base / "output")


def install(monkeypatch, base: Path) -> FolderPaths:
    """Put the modules into `sys.modules` until the test ends; the stub of `folder_paths`."""
    modules = {"folder_paths": FolderPaths(base), "server": types.ModuleType("server")}
    modules["server"].PromptServer = types.SimpleNamespace(instance=None)
    parts = (
        "cli_args", "model_management", "utils", "model_base", "model_detection", "sampler_helpers", "samplers",
        "lora", "model_patcher", "patcher_extension", "weight_adapter",
    )  # fmt: skip
    for name in ("comfy", *(f"comfy.{part}" for part in parts)):
        modules[name] = types.ModuleType(name)
    modules["comfy.cli_args"].args = types.SimpleNamespace(enable_cors_header=None)
    management = modules["comfy.model_management"]
    management.InterruptProcessingException = type("InterruptProcessingException", (BaseException,), {})
    management.get_torch_device = lambda: torch.device("cpu")
    modules["comfy.weight_adapter"].WeightAdapterBase = object
    modules["comfy.patcher_extension"].CallbacksMP = types.SimpleNamespace(ON_LOAD="on_load", ON_DETACH="on_detach")
    for name in ("WrappersMP", "PatcherInjection"):
        setattr(modules["comfy.patcher_extension"], name, types.SimpleNamespace())
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
    return modules["folder_paths"]
