"""LORA_STACK from and to other packs' nodes, and adapters saved where LoRA loaders look, through a real server."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from demo.server import PACK, WorkflowError
from tests.host.training import node

MERGE = json.loads((PACK / "tests" / "workflows" / "merge_api.json").read_text())


def graph(extra, model, name):
    """The merge of two adapters as node 4; the forward pass is that of the model that `model` gives."""
    made = copy.deepcopy(MERGE)
    made["12"]["inputs"].update(model=model, output=name)
    return made | extra


def output(server, name):
    return load_file(server.base / "output" / f"{name}.safetensors")["out"]


def options(server, kind, name):
    spec = server.get(f"/object_info/{kind}")[kind]["input"]["required"][name]
    return [one.replace("\\", "/") for one in (spec[1]["options"] if isinstance(spec[0], str) else spec[0])]


def shown(entry, name):
    return json.loads(entry["outputs"][name]["text"][0])


@pytest.fixture(scope="module")
def ours(server):
    """What Apply QR-LoRA gives for the merge."""
    server.queue(graph({}, ["5", 0], "stack ours"))
    return output(server, "stack ours")


@pytest.mark.parametrize("kind", ["Export", "Save"])
def test_a_file_goes_on_in_a_stack(server, ours, kind):
    """An export, and an adapter saved to models/loras: listed at once, and applied by another pack's node."""
    title = f"stacked {kind}"
    common = {"delta_r": ["4", 0], "filename": f"made/{title}"}
    saver = (
        node("QRLoRAExportLoRA", **common, dtype="float32")
        if kind == "Export"
        else node("QRLoRASaveDeltaR", **common, format="portable", folder="models/loras")
    )
    saver["inputs"]["lora_stack"] = ["stack", 0]
    extra = {
        "stack": node("QRLoRATestStacker", entries="[]"),
        "save": saver,
        "more": node("QRLoRATestStacker", entries="[]", lora_stack=["save", 1]),
        "apply": node("QRLoRATestApplyStack", model=["1", 0], lora_stack=["more", 0]),
    }
    entry = server.queue(graph(extra, ["apply", 0], title))
    assert shown(entry, "apply") == [[f"made/{title}.safetensors", 1.0, 0.0], 0]
    assert torch.allclose(output(server, title), ours, atol=1e-5)
    for loader, name in (("LoraLoaderModelOnly", "lora_name"), ("QRLoRALoadLoRA", "lora_name")):
        assert f"made/{title}.safetensors" in options(server, loader, name)
    assert f"made/{title}.safetensors" not in options(server, "QRLoRALoadDeltaR", "delta_r_name")
    extra = {
        "load": node("QRLoRALoadLoRA", lora_name=f"made/{title}.safetensors"),
        "own": node("QRLoRAApply", model=["1", 0], delta_r=["load", 0], strength=1.0),
    }
    server.queue(graph(extra, ["own", 0], f"{title} again"))
    assert torch.allclose(output(server, f"{title} again"), ours, atol=1e-5)


def test_a_stack_comes_in_and_goes_on_with_what_is_left(server, ours):
    """The model's part by this pack, the text encoder's by another's node: together what the stock loaders do."""
    torch.manual_seed(0)
    folder = server.base / "models" / "loras"
    module = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
    text = {f"{module}.lora_up.weight": torch.randn(768, 2), f"{module}.lora_down.weight": torch.randn(2, 768)}
    both = {
        f"lora_unet_double_blocks_0_img_attn_proj.{end}": value
        for end, value in (
            ("lora_up.weight", 0.1 * torch.randn(128, 2)),
            ("lora_down.weight", 0.1 * torch.randn(2, 128)),
        )
    }
    save_file(both | text, folder / "with text.safetensors")
    save_file(both, folder / "without text.safetensors")
    entries = [["with text.safetensors", 0.7, 0.5], ["without text.safetensors", -0.2, 0.9], ["None", 1, 1]]
    entries += [["with text.safetensors", 0.1, 0]]
    extra = {
        "clip": node("CLIPLoader", clip_name="clip_l.safetensors", type="stable_diffusion"),
        "stack": node("QRLoRATestStacker", entries=json.dumps(entries)),
        "model": node("QRLoRAFromLoRAStack", lora_stack=["stack", 0]),
        "patched": node("QRLoRAApply", model=["1", 0], delta_r=["model", 0], strength=1.0),
        "apply": node("QRLoRATestApplyStack", model=["patched", 0], clip=["clip", 0], lora_stack=["model", 1]),
    }
    entry = server.queue(graph(extra, ["apply", 0], "both ways"))
    assert shown(entry, "apply") == [["with text.safetensors", 0.0, 0.5], 1]
    assert "CLIP strength 0.5 is in the stack that goes on" in entry["outputs"]["model"]["text"][0]
    stock = {
        "stack": node("QRLoRATestStacker", entries=json.dumps([one for one in entries if one[0] != "None"])),
        "apply": node("QRLoRATestApplyStack", model=["1", 0], lora_stack=["stack", 0]),
    }
    server.queue(graph(stock, ["apply", 0], "both ways stock"))
    assert torch.allclose(output(server, "both ways"), output(server, "both ways stock"), atol=1e-5)
    assert not torch.allclose(output(server, "both ways"), ours, atol=1e-3)


def test_what_a_stack_cannot_hold_is_told(server):
    """In models/qrlora no LoRA loader looks; a published file is no LoRA; a stack is a list."""
    save = node("QRLoRASaveDeltaR", delta_r=["4", 0], filename="unstacked", format="portable", lora_stack=["stack", 0])
    extra = {"stack": node("QRLoRATestStacker", entries='[["None", 1, 1], ["x.safetensors", 1, 1]]'), "save": save}
    text = server.queue(graph(extra, ["5", 0], "unstacked"))["outputs"]["save"]["text"][0]
    assert "not in lora_stack: LoRA loaders look into models/loras" in text
    assert "unstacked.safetensors" in options(server, "QRLoRALoadDeltaR", "delta_r_name")
    before = sorted(server.base.rglob("*.safetensors"))
    save["inputs"] |= {"format": "published", "folder": "models/loras", "filename": "refused"}
    with pytest.raises(WorkflowError, match="a published file is no LoRA"):
        server.queue(graph(extra, ["5", 0], "unstacked"))
    save["inputs"] |= {"format": "portable"}
    extra["stack"]["inputs"]["entries"] = "[[1, 2]]"
    with pytest.raises(WorkflowError, match="lora_stack holds ..1, 2...*expected .file, model strength, CLIP strength"):
        server.queue(graph(extra, ["5", 0], "unstacked"))
    assert sorted(server.base.rglob("*.safetensors")) == before
