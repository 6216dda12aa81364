"""The demo's workflow: two trainings, a merge to play with, and the sheet, in API form and as a page."""

from typing import Any

from demo.workflow import input_specs, is_widget

from .concepts import ACT, DEFAULT_PAIR, ENLARGED, FIT, MERGED_PROMPT, PAIRS, SUM, Pair, Settings
from .model import STEPS, WEIGHTS
from .page import Group, Note, View, page
from .toy.features import SIZE

Graph = dict[str, dict[str, Any]]
MERGES = {"merge": ACT, "plain": SUM}  # node -> how both act there


def graph(settings: Settings, seed: int, grid: str, in_graph: bool = True, pair: Pair = PAIRS[DEFAULT_PAIR]) -> Graph:
    """The workflow in API form: train (or load) both, then a merge to play with beside a plain sum, and the sweep."""
    side = SIZE * ENLARGED
    widgets = {name: value for name, value in settings.items() if name in FIT}
    options = {name: value for name, value in settings.items() if name not in FIT}
    both = {"delta_r_style": ["style", 0], "delta_r_content": ["content", 0], "on_basis_mismatch": "stack"}
    nodes: Graph = {
        "model": node("UNETLoader", unet_name=WEIGHTS.name, weight_dtype="default"),
        "clip": node("QRLoRAToyTextEncoder"),
        "vae": node("QRLoRAToyVAE"),
        **(trained(widgets, options, pair) if in_graph else loaded(pair)),
        "prompt": prompt(MERGED_PROMPT, "merge"),
        "noise": node("EmptySD3LatentImage", width=side, height=side, batch_size=1),
        **{name: node("QRLoRAMerge", alpha=1.0, beta=1.0, act=act, **both) for name, act in MERGES.items()},
        "sweep": node("QRLoRAScaleSweep", alphas=grid, betas=grid, act=ACT, **both),
    }
    for name in (*MERGES, "sweep"):
        nodes |= drawn(name, seed)
    for name in MERGES:
        nodes[f"{name}_picture"] = node("SaveImage", images=[f"{name}_decode", 0], filename_prefix=name)
    nodes["sweep_sheet"] = node(
        "QRLoRAContactSheet",
        images=["sweep_decode", 0],
        labels=["sweep", 1],
        columns=0,
        max_size=512,
        title=["sweep", 2],
        filename_prefix="sheet",
    )
    return nodes


def prompt(text: str, merge: str) -> dict[str, Any]:
    """A prompt that tells its text, and shows which triggers of a merge it holds."""
    return node("QRLoRAPrompt", clip=["clip", 0], text=text, insert_triggers=False, delta_r=[merge, 0])


def drawn(name: str, seed: int) -> Graph:
    """What draws a merge: apply, sample, decode."""
    return {
        f"{name}_apply": node("QRLoRAApply", model=["model", 0], delta_r=[name, 0], strength=1.0),
        f"{name}_sample": node(
            "KSampler",
            model=[f"{name}_apply", 0],
            positive=["prompt", 0],
            negative=["prompt", 0],
            latent_image=["noise", 0],
            seed=seed,
            steps=STEPS,
            cfg=1.0,
            sampler_name="euler",
            scheduler="simple",
            denoise=1.0,
        ),
        f"{name}_decode": node("VAEDecode", samples=[f"{name}_sample", 0], vae=["vae", 0]),
    }


def demo_page(workflow: Graph, object_info: dict[str, Any], pair: Pair = PAIRS[DEFAULT_PAIR]) -> dict[str, Any]:
    """The workflow as the page that the demo opens: it begins at the trainings."""
    training = [["style_picture", "content_picture"], ["style"], ["content"], ["options"]]
    groups = [
        Group("1. The toy FLUX", [["model", "clip", "vae", "noise"]]),
        Group("2. One picture, one adapter", training if "options" in workflow else [["style", "content"]]),
        Group("3. Merge, one pass each: turn alpha and beta, press Run", lane("merge", "merge_picture", "prompt")),
        Group("4. The plain sum, to compare", lane("plain", "plain_picture"), below=True),
        Group("5. Every alpha and beta on one sheet, one pass each", lane("sweep", "sweep_sheet"), below=True),
    ]
    titles = {
        "style": "Style: <s>",
        "content": "Content: <c>",
        "style_picture": "The one picture of the style",
        "content_picture": "The one picture of the content",
        "merge": "Merge: one pass each",
        "merge_picture": "What it draws",
        "plain": "Merge: plain sum",
        "plain_picture": "What the sum draws",
        "sweep_sheet": "The sheet",
    }
    known = {name: title for name, title in titles.items() if name in workflow}
    note = Note(NOTE.format(content=pair.content.words, style=pair.style.words), 1, (320, 440))
    return page(workflow, object_info, groups, known, note, View(0.62, 1, always=True))


def lane(name: str, last: str, *below: str) -> list[list[str]]:
    """What follows a merge, one beside the other; `below`: what stands under Apply."""
    return [[name], [f"{name}_apply", *below], [f"{name}_sample"], [f"{name}_decode"], [last]]


NOTE = """**What this is.** A FLUX of 2.3 million parameters learns a *content* ({content}) and a *style* ({style})
from one picture each. Then both are merged.

The two panels show the trainings. When they are done, two pictures and the sheet are drawn; they are also saved in the
folder that the terminal names.

**One pass each:** the model is asked once for each adapter whose trigger stands in the prompt, and what they change is
added. **A plain sum** adds both to the weights, whatever the prompt says.

**Then play:** turn *alpha* (style) and *beta* (content), press Run; nothing is trained again. Change the prompt to
*a &lt;c&gt; in blue dotted style* and compare the two pictures."""


def trained(widgets: Settings, options: Settings, pair: Pair) -> Graph:
    """The two pictures, and a Train node for each."""
    nodes: Graph = {"options": node("QRLoRATrainOptions", **options)}
    for name, concept in pair._asdict().items():
        nodes[f"{name}_picture"] = node("LoadImage", image=f"{concept.name}.png")
        nodes[name] = node(
            "QRLoRATrain",
            model_name=WEIGHTS.name,
            clip=["clip", 0],
            vae=["vae", 0],
            dataset="none",
            instance_prompt=concept.prompt,
            trigger=concept.trigger,
            resolution=SIZE * ENLARGED,
            output_name=concept.name,
            images=[f"{name}_picture", 0],
            options=["options", 0],
            **widgets,
        )
    return nodes


def loaded(pair: Pair) -> Graph:
    """The two adapters from their files."""
    return {
        name: node("QRLoRALoadDeltaR", delta_r_name=f"{concept.name}.safetensors")
        for name, concept in pair._asdict().items()
    }


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def with_defaults(workflow: Graph, object_info: dict[str, Any]) -> Graph:
    """The workflow with every widget that it does not mention at its default, as the browser would send it."""
    result: Graph = {}
    for name, one in workflow.items():
        specs = input_specs(object_info[one["class_type"]])
        widgets = {key: spec[1] for key, spec in specs.items() if is_widget(spec) and len(spec) > 1}
        defaults = {key: options["default"] for key, options in widgets.items() if "default" in options}
        result[name] = {**one, "inputs": {**defaults, **one["inputs"]}}
    return result


def renamed(workflow: Graph, names: dict[str, str]) -> Graph:
    """The same workflow with other ids."""
    return {
        names[name]: {
            **one,
            "inputs": {
                key: [names[value[0]], value[1]] if isinstance(value, list) else value
                for key, value in one["inputs"].items()
            },
        }
        for name, one in workflow.items()
    }
