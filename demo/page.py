"""Makes a page readable: groups with a heading, read from left to right, titles, a note, and where to look first."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .workflow import ROW, editable

SIDEBAR, TOOLBAR = 80, 90  # pixels of the window that the page's own buttons take
MARGIN, HEADING = 40, 80  # around the nodes of a group, and above them
COLOURS = ("#3f789e", "#8a6d3b", "#4a7a4a", "#7a4a7a")


class Group(NamedTuple):
    """A part of the page.

    Attributes:
        title: what is read first.
        columns: names of nodes, from left to right and from top to bottom.
        below: it stands below the group before it instead of to its right.
    """

    title: str
    columns: Sequence[Sequence[str]]
    below: bool = False


class Note(NamedTuple):
    """Words in Markdown, as the first column of a group."""

    text: str
    group: int
    size: tuple[int, int]


class View(NamedTuple):
    """What the page shows when it opens: `scale`, and the group whose corner is at the left of the window.

    `always`: also where the front end would show everything (web/qrlora_example.js).
    """

    scale: float
    group: int
    always: bool = False


def page(
    workflow: Mapping[str, dict[str, Any]],
    object_info: Mapping[str, Any],
    groups: Sequence[Group],
    titles: Mapping[str, str],
    note: Note,
    view: View,
) -> dict[str, Any]:
    """The workflow in the browser's own form, arranged and explained.

    Args:
        workflow: API form: node name -> class_type and inputs.
        object_info: the host's /object_info.
        groups: every node's name, once.
        titles: node name -> title, where the node's own name says too little.
        note: one, not a manual.
        view: where the reader begins.

    Raises:
        ValueError: a node stands in no group, or in two.
    """
    placed = [name for group in groups for column in group.columns for name in column]
    if sorted(placed) != sorted(workflow):
        raise ValueError(f"in no group, or in several: {sorted(set(placed) ^ set(workflow))}")
    made = editable(dict(workflow), dict(object_info))
    nodes = dict(zip(workflow, made["nodes"]))
    for name, title in titles.items():
        nodes[name]["title"] = title
    notes = _note(note, len(nodes) + 1)
    left, top, right, bottom, corners = 0, 0, 0, 0, []
    for number, group in enumerate(groups):
        left, top = (left, bottom + MARGIN) if group.below else (right + MARGIN, 0)
        corners.append(left)
        columns = [[nodes[name] for name in column] for column in group.columns]
        if number == note.group:
            columns.insert(0, [notes])
        across, bottom = left + MARGIN, 0
        for column in columns:
            down = top + HEADING
            for node in column:
                node["pos"] = [across, down]
                down += node["size"][1] + ROW
            across += max(node["size"][0] for node in column) + MARGIN
            bottom = max(bottom, down)
        right = max(right, across)
        made["groups"].append(
            {
                "id": number + 1,
                "title": group.title,
                "bounding": [left, top, across - left, bottom - top],
                "color": COLOURS[number % len(COLOURS)],
                "font_size": 24,
                "flags": {},
            }
        )
    made["nodes"].append(notes)
    made["last_node_id"] = notes["id"]
    offset = [SIDEBAR / view.scale - corners[view.group], TOOLBAR / view.scale]
    made["extra"] = {"ds": {"scale": view.scale, "offset": offset}}
    if view.always:
        made["extra"]["qrlora_view"] = made["extra"]["ds"]
    return made


def _note(note: Note, number: int) -> dict[str, Any]:
    return {
        "id": number,
        "type": "MarkdownNote",
        "title": "Read me",
        "pos": [0, 0],
        "size": list(note.size),
        "flags": {},
        "order": number - 1,
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "properties": {},
        "widgets_values": [note.text],
        "color": "#432",
        "bgcolor": "#653",
    }
