"""The node that trains: pictures in, adapter out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..qrlora_core import QRLoRAError, TensorFile
from ..train.data.captions import DEFAULT_PROMPT, folder_version
from . import report, sockets
from .arrivals import Node
from .host import datasets, encoders, folders, session
from .host.base_format import base_format
from .train_options import combo_input, number_input
from .training import run_pictures
from .training.jobs import JOBS
from .training.request import Request, from_widgets
from .training.runs import RunFolder
from .training.service import finished_text, reporting, train
from .training.strengths import show_strengths

_SHOWN_SAMPLES = 16
_LOG_LINES = 60
_NO_SAMPLES = "no samples: sample_every is 0 or larger than steps"
_AS_RANK = {"default": 0.0, "min": 0.0, "step": 0.5}
# By this process, with size and time: one that vanished or was overwritten has to be published again.
_published: dict[Path, tuple[int, int]] = {}


class Train(Node):
    """Model file, pictures, CLIP and VAE -> DELTA_R."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return sockets.schema(
            "QRLoRATrain",
            "Train \u0394R",
            "Trains a QR-LoRA adapter on one or more pictures of a content or a style, in a process of its own. "
            "Cancel writes a checkpoint, and queueing again goes on from there. The same inputs do not train twice. "
            "ComfyUI's models are unloaded meanwhile.",
            inputs=[*_inputs(), *_numbers(), *_optional()],
            outputs=[
                sockets.DeltaR.Output(display_name="delta_r", tooltip="The adapter, for Merge, Apply and Save."),
                io.Image.Output(display_name="loss_curve", tooltip="Loss over the steps."),
                io.Image.Output(display_name="samples", tooltip="The sample pictures of the run, oldest first."),
                io.String.Output(display_name="adapter_name", tooltip="The file's name inside the folder."),
                io.String.Output(display_name="log", tooltip="The last lines of the trainer's log."),
                io.Image.Output(
                    display_name="strengths",
                    tooltip="Pictures with and without the trigger at strengths 0 to 1, and how much of the concept "
                    "and of the rest changes with strength.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_input_list=True,
            is_output_node=True,
            search_aliases=["train lora", "lora training", "fine-tune flux"],
        )

    @classmethod
    def validate_inputs(cls, dataset: Sequence[str | None]) -> bool | str:
        """Only of the dataset, because the host reports an answer once for each input that is asked for here.

        It may lie deeper than the list goes. The host itself compares the model's name with the list.
        """
        try:
            if dataset and dataset[0] not in (None, datasets.NO_DATASET):
                datasets.dataset_folder(str(dataset[0]))
        except QRLoRAError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> str:
        """Changes when the model, the dataset or a finished adapter on disk does."""
        model_name, data_name = inputs["model_name"][0], inputs["dataset"][0]
        parts: list[Any] = [sorted(str(path) for path, version in _published.items() if _version(path) != version)]
        try:
            if model_name is not None:
                parts += _version(folders.model_file(model_name)) or ()
            if data_name not in (None, datasets.NO_DATASET):
                parts.append(folder_version(datasets.dataset_folder(data_name)))
        except (QRLoRAError, OSError) as error:
            parts.append(str(error))
        return repr(parts)

    @classmethod
    def execute(cls, **inputs: Any) -> io.NodeOutput:
        job = JOBS.start(str(cls.hidden.unique_id), session.prompt_id(), session.send)
        with reporting(job):
            images, class_images = inputs.pop("images", None), inputs.pop("class_images", None)
            widgets = {name: value[0] for name, value in inputs.items()}
            request = from_widgets(images, class_images=class_images, **widgets)
            trained = train(request, job)
            if (version := _version(trained.path)) is not None:
                _published[trained.path] = version
            name = trained.path.relative_to(folders.place(request.folder).resolve()).as_posix()
            curve = run_pictures.loss_curve(job.steps(), name, job.validation())
            decoded = _samples(trained.run, request)
            if decoded is not None:
                run_pictures.write_preview(trained.path, decoded[-1])
            samples = run_pictures.note(_NO_SAMPLES) if decoded is None else decoded
            strengths = show_strengths(trained.run, request)
            text = finished_text(trained, job)
            job.tell("finished", text)
            shown = "\n".join([*request.warnings, text, report.adapter_text(trained.recipe.adapters[0])])
            log = _log_tail(trained.run.log)
            shown_by_page = {"text": [shown], "qrlora_saved": [True]}
            return io.NodeOutput(trained.recipe, curve, samples, name, log, strengths, ui=shown_by_page)


def _version(path: Path) -> tuple[int, int] | None:
    """Size and time of a file, None when it is not there."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _samples(run: RunFolder, request: Request) -> Tensor | None:
    """The newest samples as one batch, decoded by the graph's VAE; None without any."""
    latents = [TensorFile(path).tensor("latent") for step, path in run.samples().items() if step <= request.steps]
    latents = [latent for latent in latents if latent.shape[-2:] == latents[-1].shape[-2:]]
    if not latents:
        return None
    base = base_format(request.model)
    return torch.cat([encoders.decode_latent(request.vae, latent, base) for latent in latents[-_SHOWN_SAMPLES:]])


def _log_tail(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 32_768))
            text = file.read().decode("utf-8", errors="replace")
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror or error}"
    lines = [line.rsplit("\r", 1)[-1] for line in text.replace("\r\n", "\n").split("\n")]
    return "\n".join([line for line in lines if line.strip()][-_LOG_LINES:])


def _inputs() -> list[Any]:
    return [
        io.Combo.Input(
            "model_name",
            options=folders.model_names(),
            tooltip="The model to train on (FLUX.1, FLUX.2, Qwen-Image, Z-Image, Krea 2, SD3.5, SDXL): a safetensors "
            "file in models/diffusion_models or models/checkpoints (fp32, fp16, bf16 or fp8; no GGUF).",
        ),
        io.Clip.Input("clip", tooltip="The text encoders that the prompt is encoded with, as for sampling."),
        io.Vae.Input("vae", tooltip="The VAE that belongs to the model, as for sampling."),
        io.Combo.Input(
            "dataset",
            options=datasets.dataset_names(),
            default=datasets.NO_DATASET,
            tooltip="Instead of images: a folder in ComfyUI's input or datasets folder. A .txt beside a picture is its "
            "caption.",
        ),
        io.String.Input(
            "instance_prompt",
            default=DEFAULT_PROMPT,
            multiline=True,
            tooltip="Caption of every picture without a .txt. [trigger] stands for the trigger word.",
        ),
        io.String.Input("trigger", default="<c>", tooltip="The word that will call it: <c> content, <s> style."),
        combo_input("method", "delta_r_triangular as published; delta_r: all of \u0394R; qr: Q and R too, slower."),
    ]


def _numbers() -> list[Any]:
    return [
        number_input("rank", "Columns of Q. Adapters that will be merged need the same rank to share a basis."),
        number_input(
            "alpha", "The update is scaled by alpha / rank. 0: as rank, so that it is scaled by 1.", **_AS_RANK
        ),
        number_input("steps", "Optimizer steps. Raising it later continues a finished run."),
        number_input("learning_rate", "1e-4 as published; 1 for prodigy.", step=1e-6),
        io.Int.Input(
            "resolution",
            default=512,
            min=64,
            max=4096,
            step=16,
            tooltip="Pictures are resized to the area of this square; 512 as published, 1024 needs far more memory.",
        ),
        number_input("batch_size", "Pictures per forward pass."),
        number_input("gradient_accumulation", "Forward passes per step."),
        number_input("seed", "Order, noise and timesteps. Another seed is another run.", control_after_generate=False),
        io.String.Input(
            "output_name",
            default="my_adapter",
            tooltip="Name of the adapter inside the folder; sub-folders are allowed. A taken name gets a number.",
        ),
    ]


def _optional() -> list[Any]:
    return [
        io.Image.Input(
            "images",
            optional=True,
            tooltip="One picture, a batch or a list, of any sizes; all of them get the instance prompt.",
        ),
        sockets.TrainOptions.Input("options", optional=True, tooltip="From Train \u0394R Options; everything else."),
        io.Combo.Input(
            "folder",
            options=list(folders.PLACES),
            default=folders.RESULTS,
            optional=True,
            tooltip="Where the adapter gets its name. output/qrlora and models/qrlora: Load \u0394R Adapter lists it. "
            "models/loras: ComfyUI's Load LoRA, LoRA managers and Load LoRA as \u0394R do.",
        ),
        io.Image.Input(
            "class_images",
            optional=True,
            tooltip="Other pictures of the same class, such as other dogs, drawn by the model itself at best: learnt "
            "beside, they keep what the model knows of the class (prior preservation).",
        ),
        io.String.Input(
            "class_prompt",
            default="",
            optional=True,
            tooltip="Caption of all class_images, without the trigger: a photo of a dog.",
        ),
    ]
