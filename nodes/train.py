"""The node that trains: pictures in, adapter out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..qrlora_core import PathError, QRLoRAError, TensorFile, contained_path
from ..train.config import EncodeConfig, make_config
from . import report, sockets
from .host import encoders, folders, session
from .train_options import TrainOptions, combo_input, number_input
from .training import dataset as data
from .training import loss_curve as pictures
from .training.jobs import JOBS
from .training.runs import Run
from .training.service import Request, Result, finished_text, reporting, train

_SHOWN_SAMPLES = 16
_LOG_LINES = 60
_published: set[Path] = set()  # by this process; one that vanished has to be made again


class Train(io.ComfyNode):
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
                io.String.Output(display_name="adapter_name", tooltip="The file's name inside output/qrlora."),
                io.String.Output(display_name="log", tooltip="The last lines of the trainer's log."),
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
            if dataset and dataset[0] not in (None, folders.NO_DATASET):
                folders.dataset_folder(str(dataset[0]))
        except QRLoRAError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> str:
        """Changes when the model, the dataset or a finished adapter on disk does."""
        model_name, data_name = inputs["model_name"][0], inputs["dataset"][0]
        parts: list[Any] = [sorted(str(path) for path in _published if not path.is_file())]
        try:
            if model_name is not None:
                status = folders.model_file(model_name).stat()
                parts += [status.st_size, status.st_mtime_ns]
            if data_name not in (None, folders.NO_DATASET):
                parts.append(data.folder_version(folders.dataset_folder(data_name)))
        except QRLoRAError as error:
            parts.append(str(error))
        return repr(parts)

    @classmethod
    def execute(cls, **inputs: Any) -> io.NodeOutput:
        job = JOBS.start(str(cls.hidden.unique_id), session.prompt_id(), session.send)
        with reporting(job):
            images = inputs.pop("images", None)
            request = _request(images, **{name: value[0] for name, value in inputs.items()})
            result = train(request, job)
            _published.add(result.path)
            name = result.path.relative_to(folders.results_folder().resolve()).as_posix()
            curve = pictures.loss_curve(job.steps(), name)
            samples = _samples(result.run, int(request.fit["steps"]), request.vae)
            text = finished_text(result, job)
            job.tell("finished", text)
            shown = "\n".join([text, report.adapter_text(result.recipe.adapters[0])])
            return io.NodeOutput(result.recipe, curve, samples, name, _log_tail(result), ui={"text": [shown]})


def _request(
    images: Sequence[Tensor] | None,
    *,
    model_name: str,
    clip: Any,
    vae: Any,
    dataset: str,
    instance_prompt: str,
    trigger: str,
    resolution: int,
    output_name: str,
    options: TrainOptions | None = None,
    **fit: Any,
) -> Request:
    """The widgets' values, checked.

    Raises:
        DataError, PathError, ConfigError: one of them is wrong.
    """
    options = options or TrainOptions()
    trigger = trigger.strip()
    prompt = data.with_trigger(instance_prompt.strip(), trigger)
    encode = make_config(
        EncodeConfig,
        {"pipeline": "-", "pictures": ("-",), "output": "-", "resolution": resolution, "flip": options.flip},
        {"buckets": options.keep_aspect, "mask": bool(options.fit.get("use_mask", True)), "trigger": trigger},
    )
    return Request(
        model=folders.model_file(model_name),
        pictures=_pictures(images, dataset, prompt, trigger),
        clip=clip,
        vae=vae,
        output_name=_checked_name(output_name),
        fit={**fit, "trigger": trigger, "prompt": prompt},
        encode=encode,
        options=options,
    )


def _pictures(images: Sequence[Tensor] | None, name: str, prompt: str, trigger: str) -> list[data.Picture]:
    given = [batch for batch in images or () if batch is not None]
    if given and name != folders.NO_DATASET:
        raise data.DataError("both images and a dataset are given; disconnect the images or set dataset to 'none'")
    if given:
        return data.graph_pictures(given, prompt)
    if name == folders.NO_DATASET:
        raise data.DataError("there is nothing to train on: connect images, or choose a dataset folder")
    return data.folder_pictures(folders.dataset_folder(name), prompt, trigger)


def _checked_name(name: str) -> str:
    """The adapter's name as it was given, without spaces around and the ending.

    Raises:
        PathError: it leaves its folder, or lies among the runs.
    """
    name = name.strip().removesuffix(".safetensors").replace("\\", "/")
    contained_path(folders.results_folder(), name + ".safetensors")
    if name.split("/")[0].lower() == folders.RUNS:
        raise PathError(f"the name {name!r} is refused: {folders.RUNS}/ belongs to the run folders")
    return name


def _samples(run: Run, steps: int, vae: Any) -> Tensor:
    """The newest samples as one batch, decoded by the graph's VAE."""
    latents = [TensorFile(path).tensor("latent") for step, path in run.samples().items() if step <= steps]
    latents = [latent for latent in latents if latent.shape[-2:] == latents[-1].shape[-2:]]
    if not latents:
        return pictures.note("no samples: sample_every is 0 or larger than steps")
    return torch.cat([encoders.decode_latent(vae, latent) for latent in latents[-_SHOWN_SAMPLES:]])


def _log_tail(result: Result) -> str:
    try:
        with result.run.log.open("rb") as file:
            file.seek(max(0, result.run.log.stat().st_size - 32_768))
            text = file.read().decode("utf-8", errors="replace")
    except OSError as error:
        return f"{result.run.log.name} cannot be read: {error}"
    lines = [line.rsplit("\r", 1)[-1] for line in text.replace("\r\n", "\n").split("\n")]
    return "\n".join([line for line in lines if line.strip()][-_LOG_LINES:])


def _inputs() -> list[Any]:
    return [
        io.Combo.Input(
            "model_name",
            options=folders.model_names(),
            tooltip="The FLUX.1 model to train on: a safetensors file in models/diffusion_models or models/checkpoints "
            "(fp32, fp16, bf16 or fp8; no GGUF).",
        ),
        io.Clip.Input("clip", tooltip="The text encoders that the prompt is encoded with, as for sampling."),
        io.Vae.Input("vae", tooltip="FLUX's VAE (ae.safetensors)."),
        io.Combo.Input(
            "dataset",
            options=folders.dataset_names(),
            default=folders.NO_DATASET,
            tooltip="Instead of images: a folder in ComfyUI's input or datasets folder. A .txt beside a picture is its "
            "caption.",
        ),
        io.String.Input(
            "instance_prompt",
            default="a photo of a <c> dog",
            multiline=True,
            tooltip="Caption of every picture without a .txt. [trigger] stands for the trigger word.",
        ),
        io.String.Input("trigger", default="<c>", tooltip="The word that will call it: <c> content, <s> style."),
        combo_input("method", "delta_r_triangular as published; delta_r: all of \u0394R; qr: Q and R too, slower."),
    ]


def _numbers() -> list[Any]:
    return [
        number_input("rank", "Columns of Q. Adapters that will be merged need the same rank to share a basis."),
        number_input("alpha", "The update is scaled by alpha / rank.", step=0.5),
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
            tooltip="Name of the adapter inside output/qrlora; sub-folders are allowed. A taken name gets a number.",
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
    ]
