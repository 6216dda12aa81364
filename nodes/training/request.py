"""What a Train node was asked to do: its widgets' values checked, and as the trainer's settings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ...qrlora_core import PathError, contained_path, model_fingerprint
from ...train.config import TRAJECTORY_VERSION, EncodeConfig, FitConfig
from ...train.data.captions import TRIGGER_PLACEHOLDER, DatasetError, caption_warnings, with_trigger
from ...train.settings import make_config
from ..host import datasets, folders
from ..host.protocols import Clip, Vae
from . import dataset
from .dataset import class_pictures
from .options import TrainOptions
from .runs import RunFolder, key_of

_ENDING = ".safetensors"
_NO_CLASS_IMAGES = "class_prompt is set, but class_images is empty or bypassed: trained without pictures of the class"


@dataclass(frozen=True, slots=True)
class Request:
    """What one Train node was asked to do.

    Attributes:
        model: the base model's file.
        pictures: with captions; those of the class, too.
        clip, vae: the graph's.
        output_name: of the adapter, inside the folder.
        fit: fields of FitConfig that the node's own widgets hold.
        encode: resolution, buckets, flip, mask.
        options: the rest.
        warnings: what is probably not meant, in sentences.
        folder: where the adapter gets its name, see `folders.PLACES`.
    """

    model: Path
    pictures: Sequence[dataset.Picture]
    clip: Clip
    vae: Vae
    output_name: str
    fit: Mapping[str, Any]
    encode: EncodeConfig
    options: TrainOptions
    warnings: Sequence[str] = ()
    folder: str = folders.RESULTS

    @property
    def steps(self) -> int:
        return int(self.fit["steps"])

    def config(self, run: Path, data: Path) -> FitConfig:
        """The trainer's settings for a run folder and a cache of encoded pictures.

        Raises:
            ConfigError: a setting is out of its range, or contradicts another one.
        """
        paths = {
            "model": str(self.model),
            "data": str(data),
            "run_dir": str(run),
            "output": str(RunFolder(run).adapter(self.steps)),
            "basis_cache": str(folders.runs_folder() / folders.BASES),
            "name": Path(self.output_name).name.removesuffix(_ENDING),
        }
        return make_config(FitConfig, self.options.fit_fields(), self.fit, paths)

    def run_key(self, config: FitConfig, data_key: str) -> str:
        """Twelve hex digits of everything that the trained weights follow from, but for the number of steps.

        Args:
            config: of this request.
            data_key: of the encoded pictures and captions, see `dataset.cache_key`.
        """
        settings = {**config.key_fields(), **config.trajectory(), "steps": None}
        model = model_fingerprint(self.model)
        return key_of([settings, data_key, model, self.options.processes, TRAJECTORY_VERSION])


def from_widgets(
    images: Sequence[Tensor] | None,
    *,
    model_name: str,
    clip: Clip,
    vae: Vae,
    dataset: str,
    instance_prompt: str,
    trigger: str,
    resolution: int,
    output_name: str,
    alpha: float,
    rank: int,
    options: TrainOptions | None = None,
    folder: str = folders.RESULTS,
    class_images: Sequence[Tensor] | None = None,
    class_prompt: str = "",
    **fit: Any,
) -> Request:
    """A request from what the node's inputs hold.

    Raises:
        DatasetError, PathError, ConfigError: one of them is wrong.
    """
    options = options or TrainOptions()
    texts = {"trigger": trigger, "instance_prompt": instance_prompt, "class_prompt": class_prompt}
    for name, text in (*texts.items(), ("output_name", output_name)):
        _require_unicode(name, text)
    trigger = trigger.strip()
    own = _pictures(images, dataset, instance_prompt.strip(), trigger)
    of_class = class_pictures([batch for batch in class_images or () if batch is not None], class_prompt)
    encode = make_config(
        EncodeConfig,
        {"pipeline": "-", "pictures": ("-",), "output": "-", "resolution": resolution, "flip": options.flip},
        {"buckets": options.keep_aspect, "mask": bool(options.fit.get("use_mask", True)), "trigger": trigger},
        {"repeats": options.repeats, "resolutions": options.resolutions},
    )
    numbers = {"rank": rank, "alpha": alpha or float(rank)}
    # for the metadata; the captions were checked above
    prompt = instance_prompt.strip().replace(TRIGGER_PLACEHOLDER, trigger)
    return Request(
        model=folders.model_file(model_name),
        pictures=[*own, *of_class],
        clip=clip,
        vae=vae,
        output_name=checked_name(output_name, folder),
        fit={**fit, **numbers, "trigger": trigger, "prompt": prompt},
        encode=encode,
        options=options,
        warnings=[
            *caption_warnings([picture.caption for picture in own], trigger),
            *([_NO_CLASS_IMAGES] if class_prompt.strip() and not of_class else []),
        ],
        folder=folder,
    )


def checked_name(name: str, place: str = folders.RESULTS) -> str:
    """The adapter's name as it was given, without spaces around and the ending.

    Raises:
        PathError: it leaves its folder, or lies among the runs.
    """
    name = name.strip().removesuffix(_ENDING).replace("\\", "/")
    contained_path(folders.place(place), name + _ENDING)
    if place == folders.RESULTS and name.split("/")[0].lower() == folders.RUNS:
        raise PathError(f"the name {name!r} is refused: {folders.RUNS}/ belongs to the run folders")
    return name


def _pictures(images: Sequence[Tensor] | None, name: str, prompt: str, trigger: str) -> list[dataset.Picture]:
    batches = [batch for batch in images or () if batch is not None]
    if batches and name != datasets.NO_DATASET:
        raise DatasetError("both images and a dataset are given; disconnect the images or set dataset to 'none'")
    if batches:
        return dataset.graph_pictures(batches, with_trigger(prompt, trigger))
    if name == datasets.NO_DATASET:
        raise DatasetError("there is nothing to train on: connect images, or choose a dataset folder")
    return dataset.folder_pictures(datasets.dataset_folder(name), prompt, trigger)


def _require_unicode(name: str, text: str) -> None:
    """Half of a surrogate pair would fail only when the adapter's metadata is written, after all steps.

    Raises:
        DatasetError: the text holds one.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DatasetError(f"{name} is not valid Unicode text at character {error.start + 1}; type it again") from error
