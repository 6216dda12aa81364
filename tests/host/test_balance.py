"""dR Balance in a real ComfyUI: its numbers are those of pictures sampled by the host, and nothing stays behind."""

import json

import pytest

import qrlora_core as core
from tests.host.test_server import node

FAMILIES = ("FLUX.1", "FLUX.2", "Z-Image", "Qwen-Image", "SD3.5", "SDXL")
# two values for each, all acts: three whole trials, three more pairs on two prompts, two lonely factors each
EACH_POINT = 4 + 3 * 4 + 3 * 2 + 2 * 1


@pytest.fixture(scope="module")
def probe(run_probe):
    return run_probe("balance_probe.py")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_numbers_are_those_of_sampled_pictures(probe, family):
    one = probe["families"][family]
    assert "error" not in one, one["error"]
    assert one["size"] > 1e-6 and one["gap"] < 1e-2
    assert one["evaluations"] == EACH_POINT + 1 and one["points"] == 1 and one["hooks"] == 0
    assert all(0.1 < survival < 3 for survival in one["survival"])


def test_what_is_known_is_not_measured_again(probe):
    first, again, seed, strength, more, fewer = probe["repeated"]
    assert first > 0 and again == 0 and seed == strength == first and more > first and fewer == 0


def test_alone_at_full_strength_all_of_it_survives(probe):
    found = probe["alone"]
    assert found["style"] == pytest.approx(1, abs=1e-6) and found["purity"] == pytest.approx(1, abs=1e-6)
    assert found["content"] is None
    assert found["rounding"] == [[False, True], [True, True]], "one that is not there has no survival of rounding"
    assert found["after another live node"] < 1e-3, "which counts as the model's own"


def test_cancel_and_errors_leave_nothing_behind(probe):
    found = probe["stopped"]
    assert found["cancel"] == "InterruptProcessingException" and found["error"] == "RuntimeError"
    for kind in ("cancel", "error"):
        assert found[f"{kind} calls"] <= 8, "the evaluation in which it happened is the last one"
        assert found[f"{kind} hooks"] == 0 and not found[f"{kind} pending"] and found[f"{kind} base"] == 0
        assert found[f"{kind} again"] == 2 * EACH_POINT + 6, "nothing half-measured is kept"


def test_refusals_say_what_to_do(probe):
    found = probe["refused"]
    assert found["sigmas"].startswith("3 sigmas") and "connect a longer schedule" in found["sigmas"]
    assert "not finite" in found["black"] and "noise level 1.00" in found["black"]
    assert "raise points to 2 or more" in found["one point"]
    assert "style_trigger" in found["no trigger"]
    assert found["nothing"][:4] == [0, 1.0, 1.0, "{}"] and "nothing to measure" in found["nothing"][4]


def graph(**inputs):
    settings = {
        "choose": "balanced", "act": "any", "alpha": 1.0, "beta": 1.0, "grid": 3, "lowest": 0.4, "highest": 1.2,
        "points": 2, "size": 128, "noises": 1, "seed": 0, "on_basis_mismatch": "stack",
    }  # fmt: skip
    adapters = {
        name: node("QRLoRAToyAdapter", adapter=name.removeprefix("delta_r_"))
        for name in ("delta_r_style", "delta_r_content")
    }
    links = {name: [name, 0] for name in adapters} | {"model": ["model", 0], "clip": ["clip", 0]}
    return adapters | {
        "model": node("QRLoRAToyModel"),
        "clip": node("QRLoRAToyTextEncoder"),
        "balance": node("QRLoRABalance", **{**links, **settings, **inputs}),
        "json": node("PreviewAny", source=["balance", 4]),
        "alpha": node("PreviewAny", source=["balance", 1]),
        "beta": node("PreviewAny", source=["balance", 2]),
        "positive": node("QRLoRAPrompt", clip=["clip", 0], text="a <c> in <s> style", insert_triggers=False),
        "applied": node("QRLoRAApply", model=["model", 0], delta_r=["balance", 0], strength=1.0),
        "sampled": node(
            "KSampler", model=["applied", 0], positive=["positive", 0], negative=["positive", 0],
            latent_image=["latent", 0], seed=1, steps=2, cfg=1.0, sampler_name="euler", scheduler="simple", denoise=1.0,
        ),
        "latent": node("EmptyLatentImage", width=128, height=128, batch_size=1),
        "vae": node("QRLoRAToyVAE"),
        "decoded": node("VAEDecode", samples=["sampled", 0], vae=["vae", 0]),
        "saved": node("PreviewImage", images=["decoded", 0]),
    }  # fmt: skip


def test_the_node_proposes_and_its_merge_is_sampled(server):
    entry = server.queue(graph())
    text = entry["outputs"]["balance"]["text"][0]
    told = json.loads(entry["outputs"]["json"]["text"][0])
    assert entry["outputs"]["balance"]["images"] and entry["outputs"]["saved"]["images"]
    chosen = told["chosen"]
    assert f"balanced: {chosen['act']}" in text and "predictions in" in text and "QR-LoRA Prompt" in text
    assert chosen == told["proposals"]["balanced"] and chosen["drift"] == 0
    assert float(entry["outputs"]["alpha"]["text"][0]) == chosen["alpha"]
    assert float(entry["outputs"]["beta"]["text"][0]) == chosen["beta"]
    assert told["prompts"] == core.four_prompts("", ["<s>"], ["<c>"])
    assert {cell["act"] for cell in told["cells"]} == set(core.ACTS)
    for cell in told["cells"]:
        if cell["act"] == "always" and cell["alpha"] == cell["beta"]:
            assert cell["drift"] > 0.1 and cell["style"] > 0.1 and cell["content"] > 0.1
    drifts = [cell["drift"] for cell in told["cells"] if cell["act"] == "always" and cell["beta"] == 0.8]
    assert drifts == sorted(drifts), "more style, more drift"


def test_choosing_measures_nothing_anew(server):
    server.queue(graph(seed=5, points=1))
    for choose in ("content", "by hand"):
        more = {"act": "any", "alpha": 0.8, "beta": 1.2} if choose == "by hand" else {}
        entry = server.queue(graph(seed=5, points=1, choose=choose, **more))
        text = entry["outputs"]["balance"]["text"][0]
        assert "known from the last time" in text and f"{choose}: " in text
    assert "alpha 0.8, beta 1.2" in text
    told = json.loads(entry["outputs"]["json"]["text"][0])
    assert (told["chosen"]["alpha"], told["chosen"]["beta"]) == (0.8, 1.2)
    entry = server.queue(graph(seed=5, points=1, choose="by hand", alpha=0.9, beta=1.0))
    assert "by hand: " in entry["outputs"]["balance"]["text"][0] and entry["outputs"]["balance"]["images"]
    assert "predictions in" in entry["outputs"]["balance"]["text"][0], "the grid has no 0.9"


def test_one_adapter_alone_and_none(server):
    alone = graph(grid=2, lowest=0.5, highest=1.0, noises=2)
    del alone["balance"]["inputs"]["delta_r_content"]
    text = server.queue(alone)["outputs"]["balance"]["text"][0]
    assert "content: nothing connected" in text and "by prompt, alpha 1," in text
    del alone["balance"]["inputs"]["delta_r_style"]
    assert "nothing to measure" in server.queue(alone)["outputs"]["balance"]["text"][0]


def test_own_prompts_and_the_plain_sum(server):
    prompts = {"prompt": "a <c> in <s> style, big", "plain_prompt": "a circle"}
    entry = server.queue(graph(act="always", noises=2, **prompts))
    told = json.loads(entry["outputs"]["json"]["text"][0])
    assert told["prompts"]["none"] == "a circle"
    assert told["prompts"]["style"] == "a in <s> style, big"
    assert {cell["act"] for cell in told["cells"]} == {"always"} and told["chosen"]["drift"] > 0
    assert "% of the model's own prediction" in entry["outputs"]["balance"]["text"][0]
