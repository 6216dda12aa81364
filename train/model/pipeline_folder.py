"""A diffusers pipeline folder on this disk: whose it is, and how parts of it are loaded. Nothing is ever downloaded."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..errors import OUT_OF_MEMORY, TrainError
from .backbones import BACKBONES, Backbone
from .transformer import install_hint, require_package


@dataclass(frozen=True, slots=True)
class PipelineFolder:
    """A folder that belongs to a family that can be trained on.

    Attributes:
        path: of the folder.
        backbone: the family.
        class_name: of diffusers' pipeline that it is loaded by.
        own_class: of diffusers' pipeline that it was saved by.
    """

    path: Path
    backbone: Backbone
    class_name: str
    own_class: str

    def load(self, what: str, dtype: torch.dtype, device: torch.device | None = None, **without: None) -> Any:
        """The pipeline, without the parts that are named with None, and where one is named, on a device.

        Raises:
            TrainError: reason "model"; "library" when a package is missing or too old.
        """
        kind = self._class(self.class_name)

        def load() -> Any:
            loaded = kind.from_pretrained(self.path, torch_dtype=dtype, local_files_only=True, **without)
            return loaded if device is None else loaded.to(device)

        return load_part(load, what)

    def load_vae(self, dtype: torch.dtype, device: torch.device) -> Any:
        """The VAE alone.

        Raises:
            TrainError: see `load`.
        """
        kind, options = self._class(self.backbone.pipeline.vae_class), {"subfolder": "vae", "local_files_only": True}
        return load_part(lambda: kind.from_pretrained(self.path, torch_dtype=dtype, **options).to(device), "VAE")

    def _class(self, name: str) -> Any:
        import diffusers

        try:
            return getattr(diffusers, name)
        except AttributeError as error:
            raise TrainError(
                "library",
                f"diffusers {diffusers.__version__} has no {name}, which {self.backbone.title} needs; "
                f"{install_hint('--upgrade diffusers')}",
            ) from error


def open_pipeline(path: Path) -> PipelineFolder:
    """Whose pipeline folder this is, before anything of it is loaded.

    Raises:
        TrainError: reason "model": no pipeline folder, one of a family that cannot be trained on, or one whose parts
            are of different families; "library" when transformers is not installed.
    """
    require_package("transformers", "a pipeline folder's text encoders")
    classes = {name: (backbone, loaded) for backbone in BACKBONES for name, loaded in backbone.pipeline.classes.items()}
    index = path / "model_index.json"
    if not index.is_file():
        state = "is a file" if path.is_file() else "has no model_index.json" if path.is_dir() else "does not exist"
        raise TrainError(
            "model",
            f"the pipeline folder {str(path)!r} {state}. Expected a local diffusers folder of {_titles()} with the "
            "sub-folders vae, text_encoder and tokenizer; nothing is downloaded",
        )
    name = _table(index, "the pipeline folder").get("_class_name")
    if name not in classes:
        raise TrainError(
            "model",
            f"the pipeline folder {path.name!r} is of a {str(name)[:80]}, expected one of {', '.join(classes)}",
        )
    backbone, loaded = classes[name]
    for part, wanted in ((backbone.pipeline.network, backbone.model_class), ("VAE", backbone.pipeline.vae_class)):
        config = path / part.lower() / "config.json"
        stated = (
            _table(config, f"the pipeline folder's {part}").get("_class_name", wanted) if config.is_file() else wanted
        )
        if stated != wanted:
            raise TrainError(
                "model",
                f"the pipeline folder {path.name!r} is of {backbone.title}, whose {part} is {wanted}; the one in it is "
                f"{str(stated)[:80]}, of another model",
            )
    return PipelineFolder(path, backbone, loaded, str(name))


def load_part(load: Callable[[], Any], what: str) -> Any:
    """Load something of a pipeline folder.

    Raises:
        TrainError: reason "model"; "library" when it needs a package that is missing.
    """
    try:
        return load()
    except OUT_OF_MEMORY:
        raise
    except ImportError as error:
        raise TrainError("library", f"the pipeline folder's {what} need a package: {error}") from error
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, SafetensorError) as error:
        raise TrainError(
            "model",
            f"the pipeline folder's {what} cannot be loaded: {error}. Expected a local diffusers folder of {_titles()} "
            "with model_index.json; nothing is downloaded",
        ) from error


def _titles() -> str:
    *titles, last = (backbone.title for backbone in BACKBONES)
    return f"{', '.join(titles)} or {last}"


def _table(path: Path, whose: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TrainError("model", f"{whose} cannot be loaded: its {path.name} is damaged ({error})") from error
    return value if isinstance(value, dict) else {}
