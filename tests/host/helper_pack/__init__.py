"""Nodes that only the tests and the demo need: conditioning and a forward pass on the golden inputs."""

import gc
import json
import zlib
from pathlib import Path

import comfy.model_detection
import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import ComfyExtension, io
from safetensors.torch import load_file, save_file

detected = comfy.model_detection.detect_unet_config


def detect_small(*args, **kwargs):
    """Hosts know some sizes only: those before 0.33 of a FLUX.1, all of them of others. Here sizes follow the file."""
    config = detected(*args, **kwargs)
    if config is None:
        return None

    def width(name):
        return args[0][f"{args[1]}{name}.weight"].shape[1]

    kind = config.get("image_model")
    if kind == "flux":
        config.update(hidden_size=128, num_heads=1)
        config.update(context_in_dim=width("txt_in"), vec_in_dim=width("vector_in.in_layer"))
    if kind == "qwen_image":
        config.update(num_attention_heads=args[0][f"{args[1]}img_in.weight"].shape[0] // 128)
        config.update(joint_attention_dim=width("txt_in"))
    if kind == "lumina2" and config["dim"] not in (2304, 3840):  # as it does for Z-Image's own size
        heads = config["dim"] // 128
        config.update(n_heads=heads, n_kv_heads=heads, axes_dims=[32, 48, 48], axes_lens=[1536, 512, 512])
        config.update(rope_theta=256.0, ffn_dim_multiplier=8.0 / 3.0, z_image_modulation=True, time_scale=1000.0)
        refiners = {key.split(".")[1] for key in args[0] if key.startswith(f"{args[1]}noise_refiner.")}
        config.update(pad_tokens_multiple=32, n_refiner_layers=len(refiners))
    return config


comfy.model_detection.detect_unet_config = detect_small


def golden(filename):
    return load_file(Path(folder_paths.get_input_directory()) / filename)


class Conditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QRLoRATestConditioning",
            category="QR-LoRA/test",
            inputs=[io.String.Input("filename", default="tensors.safetensors")],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, filename):
        tensors = golden(filename)
        pooled = {"pooled_output": tensors["input.pooled_projections"][:1]}
        return io.NodeOutput([[tensors["input.encoder_hidden_states"][:1], pooled]])


class Forward(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QRLoRATestForward",
            category="QR-LoRA/test",
            inputs=[
                io.Model.Input("model"),
                io.String.Input("filename", default="tensors.safetensors"),
                io.String.Input("output", default="out"),
            ],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, filename, output):
        result = forward(model, golden(filename))
        save_file({"out": result.contiguous()}, Path(folder_paths.get_output_directory()) / f"{output}.safetensors")
        return io.NodeOutput(ui={"text": [output]})


@torch.no_grad()
def forward(model, tensors):
    """The model's output on the golden inputs, which are those of diffusers (packed latents, sigma as time)."""
    comfy.model_management.load_models_gpu([model], force_full_load=True)
    return run(model, tensors)


@torch.no_grad()
def run(model, tensors):
    """The same, with the weights as they lie."""
    batch = tensors["input.hidden_states"].shape[0]
    return model.model.diffusion_model.forward_orig(
        tensors["input.hidden_states"],
        tensors["input.img_ids"][None].repeat(batch, 1, 1),
        tensors["input.encoder_hidden_states"],
        tensors["input.txt_ids"][None].repeat(batch, 1, 1),
        tensors["input.timestep"],
        tensors["input.pooled_projections"],
        tensors["input.guidance"],
    )


class SaveConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QRLoRATestSaveConditioning",
            category="QR-LoRA/test",
            inputs=[io.Conditioning.Input("conditioning"), io.String.Input("output")],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, conditioning, output):
        embeds, details = conditioning[0]
        tensors = {"embeds": embeds.contiguous(), "pooled": details["pooled_output"].contiguous()}
        save_file(tensors, Path(folder_paths.get_output_directory()) / f"{output}.safetensors")
        return io.NodeOutput(ui={"text": [output]})


class Anything(io.ComfyNode):
    """What switches and reroutes of other packs do: a text, from a socket that says nothing."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QRLoRATestAny",
            category="QR-LoRA/test",
            inputs=[io.String.Input("what")],
            outputs=[io.AnyType.Output()],
        )

    @classmethod
    def execute(cls, what):
        return io.NodeOutput(what)


class Foreign(io.ComfyNode):
    """A node of another pack, with sockets of the types that this pack had at first: hands on what comes."""

    @classmethod
    def define_schema(cls):
        delta_r, residual = io.Custom("DELTA_R"), io.Custom("RESIDUAL")
        return io.Schema(
            node_id="QRLoRATestForeign",
            category="QR-LoRA/test",
            inputs=[delta_r.Input("delta_r", optional=True), residual.Input("residual", optional=True)],
            outputs=[delta_r.Output(), residual.Output()],
        )

    @classmethod
    def execute(cls, delta_r=None, residual=None):
        return io.NodeOutput(delta_r, residual)


class Stacker(io.ComfyNode):
    """What LoRA stackers do: entries of their own behind those that come in."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QRLoRATestStacker",
            category="QR-LoRA/test",
            inputs=[io.String.Input("entries"), io.Custom("LORA_STACK").Input("lora_stack", optional=True)],
            outputs=[io.Custom("LORA_STACK").Output()],
        )

    @classmethod
    def execute(cls, entries, lora_stack=None):
        return io.NodeOutput([*(lora_stack or []), *map(tuple, json.loads(entries))])


class ApplyStack(io.ComfyNode):
    """What the node does that applies a stack: every file by the host's own loader."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QRLoRATestApplyStack",
            category="QR-LoRA/test",
            inputs=[
                io.Model.Input("model"),
                io.Custom("LORA_STACK").Input("lora_stack"),
                io.Clip.Input("clip", optional=True),
            ],
            outputs=[io.Model.Output(), io.Clip.Output()],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, lora_stack, clip=None):
        for name, strength, clip_strength in lora_stack:
            lora = comfy.utils.load_torch_file(folder_paths.get_full_path_or_raise("loras", name), safe_load=True)
            model, clip = comfy.sd.load_lora_for_models(model, clip, lora, strength, clip_strength)
        changed = sum(map(len, clip.patcher.patches.values())) if clip is not None else 0
        return io.NodeOutput(model, clip, ui={"text": [json.dumps([*map(list, lora_stack), changed])]})


class RandomClip:
    """Prompts -> a random vector for each word, as wide as a text encoder of billions of weights would give it."""

    def __init__(self, width, pooled, pooled_width):
        self.width, self.pooled, self.pooled_width = width, pooled, pooled_width
        cpu = torch.device("cpu")
        weights = torch.nn.Linear(1, width)
        torch.nn.init.ones_(weights.weight)  # the same encoder for every server
        torch.nn.init.ones_(weights.bias)
        self.patcher = ModelPatcher(weights, load_device=cpu, offload_device=cpu)

    def tokenize(self, text, **_):
        return text.split() or [""]

    def encode_from_tokens_scheduled(self, tokens, **_):
        seeds = [zlib.crc32(word.encode(errors="surrogatepass")) for word in tokens]
        rows = [torch.randn(self.width, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        embeds = torch.stack(rows)[None]
        # some encoders of these families have both, of use to no model of theirs
        pooled = embeds.mean(dim=1)[:, : self.pooled_width or self.width]
        details = {"pooled_output": pooled if self.pooled else None}
        return [[embeds, details | {"attention_mask": torch.ones(embeds.shape[:2], dtype=torch.long)}]]


class LoadRandomClip(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QRLoRATestClip",
            category="QR-LoRA/test",
            inputs=[
                io.Int.Input("width", max=100_000),
                io.Boolean.Input("pooled", default=False),
                io.Int.Input("pooled_width", default=0, max=100_000, optional=True),
            ],
            outputs=[io.Clip.Output()],
        )

    @classmethod
    def execute(cls, width, pooled, pooled_width=0):
        return io.NodeOutput(RandomClip(width, pooled, pooled_width))


class SaveLatents(io.ComfyNode):
    """A latent as it is, and as the sampler would see it in a model."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QRLoRATestSaveLatent",
            category="QR-LoRA/test",
            inputs=[io.Model.Input("model"), io.Latent.Input("samples"), io.String.Input("output")],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, samples, output):
        tensors = {"stored": samples["samples"], "seen": model.model.process_latent_in(samples["samples"])}
        tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
        save_file(tensors, Path(folder_paths.get_output_directory()) / f"{output}.safetensors")
        return io.NodeOutput(ui={"text": [output]})


class TestExtension(ComfyExtension):
    async def get_node_list(self):
        ours = [Conditioning, Forward, SaveConditioning, Anything, Foreign, Stacker, ApplyStack]
        return [*ours, LoadRandomClip, SaveLatents]


async def comfy_entrypoint():
    gc.freeze()  # what the imports made: going through all of it takes a third of a second each time models are freed
    return TestExtension()
