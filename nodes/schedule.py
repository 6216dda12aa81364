"""A strength over the sampling."""

from comfy_api.latest import io

from ..qrlora_core import NOTHING, PRESETS, MergeRecipe, Schedule, SettingError, content_first, parse_schedule
from . import report, sockets
from .arrivals import Node

CUSTOM = "points"
# The two halves of "content first, then style", the order that keeps both best
HALVES = ("style second", "content first")


class ScheduleNode(Node):
    """DELTA_R -> DELTA_R with a strength that follows the sampling."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return sockets.schema(
            "QRLoRASchedule",
            "\u0394R Schedule",
            "A strength over the sampling: by points, or a preset. Apply QR-LoRA follows it step by step, in live "
            "mode. Each adapter can have its own; schedules in a row multiply.",
            inputs=[
                sockets.delta_r_input("delta_r", "An adapter or a merge; all of it follows the schedule."),
                sockets.newest(
                    io.Combo.Input,
                    "preset",
                    options=[CUSTOM, *PRESETS, *HALVES],
                    default=CUSTOM,
                    tooltip="points: what is written below. content first and style second: the two halves of a merge, "
                    "content while sigma is above switch, then style.",
                    extra_dict={"qrlora_presets": PRESETS},  # the page draws the curve of what is chosen
                ),
                io.String.Input(
                    "points",
                    default="0: 1, 0.3: 1, 0.6: 0",
                    tooltip="Places and factors: '0: 1, 0.5: 0' fades out over the first half. Two at one place "
                    "are a jump. Only for the preset 'points'.",
                ),
                io.Combo.Input(
                    "over",
                    options=["steps", "sigma"],
                    default="steps",
                    tooltip="What a place is. steps: 0 the first, 1 the end of the sampling, places rise. sigma: the "
                    "noise, places fall from 1 to 0. Only for the preset 'points'.",
                ),
                io.Float.Input(
                    "switch",
                    default=0.5,
                    min=0.01,
                    max=0.99,
                    step=0.01,
                    tooltip="The sigma at which 'content first' ends and 'style second' begins.",
                ),
            ],
            outputs=[sockets.DeltaR.Output(display_name="delta_r", tooltip="For Merge \u0394R and Apply QR-LoRA.")],
            search_aliases=["schedule", "fade", "strength over steps", "timestep", "delta r schedule", "keyframes"],
        )

    @classmethod
    def execute(
        cls, preset: str, points: str, over: str, switch: float, delta_r: MergeRecipe = NOTHING
    ) -> io.NodeOutput:
        schedule = schedule_of(preset, points, over, switch)
        scheduled = delta_r.scheduled(schedule)
        return io.NodeOutput(scheduled, ui={"text": [report.schedule_text(schedule, scheduled)]})


def schedule_of(preset: str, points: str, over: str, switch: float) -> Schedule:
    """The schedule that the widgets say.

    Raises:
        SettingError: the points cannot be read, or there is no such preset.
    """
    if not isinstance(preset, str) or preset not in (CUSTOM, *PRESETS, *HALVES):
        raise SettingError(f"preset is {preset!r:.80}, expected one of {', '.join((CUSTOM, *PRESETS, *HALVES))}")
    if preset in HALVES:
        return content_first(switch)[HALVES.index(preset)]
    if preset in PRESETS:
        return parse_schedule(PRESETS[preset])
    return parse_schedule(points, "sigma" if over == "sigma" else "steps")
