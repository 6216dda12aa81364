"""Nodes that only the tests and the demo need: conditioning and a forward pass on the golden inputs."""

import json
from pathlib import Path

import comfy.model_detection
import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import ComfyExtension, io
from safetensors.torch import load_file, save_file

detected = comfy.model_detection.detect_unet_config


def detect_small(*args, **kwargs):
    """Hosts before 0.33 do not read a FLUX's sizes from its file; here all of them do."""
    config = detected(*args, **kwargs)
    if config is not None and "hidden_size" in config:
        state, prefix = args[0], args[1]
        config.update(hidden_size=128, num_heads=1)
        config.update(context_in_dim=state[f"{prefix}txt_in.weight"].shape[1])
        config.update(vec_in_dim=state[f"{prefix}vector_in.in_layer.weight"].shape[1])
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


class TestExtension(ComfyExtension):
    async def get_node_list(self):
        return [Conditioning, Forward, SaveConditioning, Anything, Stacker, ApplyStack]


async def comfy_entrypoint():
    return TestExtension()
