"""Every input of every node of the pack, through `/prompt`, with values that a stranger's workflow may hold.

What is looked at afterwards: each answer is one that ComfyUI gives on purpose, each failure one of the pack's errors,
nothing outside of the registered folders was read or written, and the server still does the main job.
"""

import json
import os
import time
from pathlib import Path

import pytest

from demo.toy.features import TEXT_LENGTH, words
from tests.host.test_server import WORKFLOW, node, workflow
from tests.host.training import light_graph

SECRET = "canary"
LONG_AGO = 10**18  # nanoseconds: a file that is read gets a newer time of access, once that is older than its change
FLOATS = (-1, 0, 1e308, -4.0001, float("nan"), float("inf"), float("-inf"), 10**400, 2**63, "1", "nan", True)
IN_RANGE = (-1, 0, "1", True)  # of every factor
ODD = (None, [], {}, ["2"], ["2", 99], ["nowhere", 0], ["2", "0"], {"a": [1]}, [[["2", 0]]])
TEXTS = (
    "",
    " ",
    "\0",
    "a\nb\r\x1b[31m",
    "\ud800",
    "\u202etxt",
    "x" * 100_000,
    "9" * 5_000,
    "0:1:1e-999999",
    "1e99999999999",
    "nan, inf",
    "," * 5_000,
    "alpha=1, beta=2",
    "%s{0}%(x)s${HOME}`id`$(id)",
    "<img src=x onerror=alert(1)>",
    "__class__",
)
# Names of files that lie outside of every folder, as far as names can say so; {out} is a folder with a real adapter
PATHS = (
    "../canary.safetensors",
    "../../../../../../../../{out}/canary.safetensors",
    "{out}/canary.safetensors",
    "..\\..\\canary.safetensors",
    "sub/../../../canary.safetensors",
    "C:\\canary.safetensors",
    "\\\\server\\share\\canary",
    "file://{out}/canary.safetensors",
    "~/canary.safetensors",
    "link/owned.safetensors",
    "link/../../../outside/canary.safetensors",
    "CON",
    "a/" * 300,
    ".",
    "..",
    "canary.safetensors\0.png",
)
DRAWS, LONGEST_TRIGGER = "QRLoRABalance", 10_000  # the node that takes long with every value that it accepts
# what our own nodes raise on purpose
REFUSALS = (
    *("SettingError", "PathError", "FileFormatError", "TargetError", "BasisMismatchError", "WeightError"),
    *("ConfigError", "DatasetError", "DataError", "TrainingError", "PreflightError", "EncodeError"),
)


@pytest.fixture(scope="module")
def outside(server):
    """A folder beside the server's, with an adapter, a picture and a text that no workflow may reach."""
    folder = server.base.parent / "outside"
    folder.mkdir()
    adapter = (server.base / "models" / "qrlora" / "official_style.safetensors").read_bytes()
    for place in (folder, server.base, server.base.parent, server.base / "models"):
        (place / f"{SECRET}.safetensors").write_bytes(adapter)
    (folder / f"{SECRET}.png").write_bytes((server.base / "input" / "picture 0.png").read_bytes())
    linked = server.base.parent / "linked"  # what the machine's owner links may be read, and is never written
    linked.mkdir()
    (linked / "owned.safetensors").write_bytes(adapter)
    for place in (server.base / "input", server.base / "models" / "qrlora", server.base / "models" / "loras"):
        (place / "link").symlink_to(linked, target_is_directory=True)
    yield folder
    for place in (server.base / "input", server.base / "models" / "qrlora", server.base / "models" / "loras"):
        (place / "link").unlink()
    for place in (server.base, server.base.parent, server.base / "models"):
        (place / f"{SECRET}.safetensors").unlink()


def canaries(server):
    return [path for path in (server.base.parent).rglob(f"{SECRET}.*") if "link" not in path.parts]


def written(server):
    """Every file that a workflow must not make or change: all of the base folder but where results go."""
    results = [server.base / name for name in ("output", "temp", "user", "models/qrlora", "models/loras", "server.log")]
    found = {}
    for path in server.base.parent.rglob("*"):
        if path.is_file() and not any(path == one or one in path.parents for one in results):
            status = path.stat()
            found[path] = (status.st_size, status.st_mtime_ns)
    return found


def inputs_of(info, kind):
    """Name -> (type or options, its settings) of a node's inputs."""
    sections = info[kind]["input"]
    return {
        name: (spec + [{}])[:2] for part in ("required", "optional") for name, spec in sections.get(part, {}).items()
    }


def good_graph(info, kind):
    """A graph that runs one node with its defaults; None when it needs what no other node here gives."""
    links = {"MODEL": ["1", 0], "IMAGE": ["pictures", 0], "STRING": None, "CONDITIONING": ["6", 0], "VAE": ["9", 0]}
    links |= {"QRLORA_DELTA_R,DELTA_R": ["2", 0], "QRLORA_RESIDUAL,RESIDUAL": ["rest", 0], "CLIP": ["clip", 0]}
    links |= {"HOOKS": None, "LORA_STACK": None}
    values = {}
    required = info[kind]["input"].get("required", {})
    for name, (what, settings) in inputs_of(info, kind).items():
        if what == "LORA_STACK":
            values[name] = [["official_style.safetensors", 1.0, 1.0]]
        elif settings.get("forceInput") or (isinstance(what, str) and what in links and what != "STRING"):
            link = links.get(what)
            if link is None and name in required:
                return None
            if link is not None and (name in required or what.startswith("QRLORA_DELTA_R")):
                values[name] = link
        elif isinstance(what, list) or what == "COMBO":
            options = what if isinstance(what, list) else settings.get("options", [])
            values[name] = settings.get("default", options[0] if options else "")
        elif "default" in settings:
            values[name] = settings["default"]
    for name in ("delta_r_name",):
        if name in values:
            values[name] = "official_style.safetensors"
    if kind == "QRLoRABalance":  # it would ask the model hundreds of times for each value
        values |= {"grid": 2, "points": 1, "size": 64}
    if "residual_name" in values:
        values["residual_name"] = "official_residual_fp16.safetensors"
    graph = {key: WORKFLOW[key] for key in ("1", "2", "6", "9")}
    graph["pictures"] = node("EmptyImage", width=32, height=32, batch_size=2, color=255)
    graph["clip"] = node("QRLoRAToyTextEncoder")
    graph["rest"] = node("QRLoRALoadResidual", residual_name="official_residual_fp16.safetensors")
    graph["node"] = {"class_type": kind, "inputs": values}
    graph["shown"] = node("PreviewAny", source=["node", 0])
    return graph


def submit(server, graph):
    """Queue without a look at the answer's content; (status, ticket)."""
    import urllib.error
    import urllib.request

    body = json.dumps({"prompt": graph, "client_id": "crawl"}).encode()
    request = urllib.request.Request(server.url + "/prompt", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)["prompt_id"]
    except urllib.error.HTTPError as error:
        error.read()
        return error.code, ""


def drained(server, tickets):
    """History of every ticket, once the queue is empty."""
    emptied(server)
    return history(server, tickets)


def emptied(server, patience=300):
    """Wait until the queue is empty."""
    until = time.monotonic() + patience
    while time.monotonic() < until:
        queue = server.get("/queue")
        if not queue["queue_running"] and not queue["queue_pending"]:
            return
        time.sleep(0.1)
    raise AssertionError("the queue did not empty")


def history(server, tickets):
    """History of those tickets that have one."""
    found = server.get("/history?max_items=10000")
    return {ticket: found[ticket] for ticket in tickets if ticket in found}


def error_of(entry):
    """(node, class of the exception, message) of a failed entry."""
    for kind, data in entry["status"]["messages"]:
        if kind == "execution_error":
            return data["node_id"], data["exception_type"].rpartition(".")[2], data["exception_message"]
    return None


def hostile_values(what, settings, outside):
    """What one input is given in turn."""
    paths = [path.replace("{out}", str(outside)) for path in PATHS]
    if isinstance(what, list) or what == "COMBO":
        return [*paths, "", "nowhere", "\ud800", 7, *ODD]
    if what in ("FLOAT", "INT"):
        return [*FLOATS, *ODD[:4]]
    if what == "BOOLEAN":
        return ["yes", 2, None, [], {}]
    if what == "STRING":
        return [*TEXTS, *paths, 7, *ODD[:4]]
    return [7, "text", *ODD]


def passes(name, what, value):
    """Whether \u0394R Balance goes on with a value: then it measures and draws, which takes long."""
    if what == "FLOAT":
        return isinstance(value, int | str) and value in IN_RANGE
    if what != "STRING" or isinstance(value, list) or len(words(str(value))) > TEXT_LENGTH:
        return False
    return "trigger" not in name or len(str(value)) <= LONGEST_TRIGGER


def together(inputs, outside):
    """What \u0394R Balance goes on with, in all inputs of a type at once: each value in two of them."""
    for kind in ("STRING", "FLOAT"):
        names = [name for name, (what, _) in inputs.items() if what == kind]
        values = [value for value in hostile_values(kind, {}, outside) if passes("", kind, value)]
        for turned in (values, values[1:] + values[:1]):
            for start in range(0, len(turned), len(names)):
                both = zip(names, turned[start : start + len(names)], strict=False)
                yield {name: value for name, value in both if passes(name, kind, value)}


def test_no_input_of_any_node_does_harm(server, outside):
    info = server.get("/object_info")
    kinds = [kind for kind, one in info.items() if one["python_module"].endswith("qr-lora")]
    assert len(kinds) >= 12
    secrets = canaries(server)
    for path in secrets:
        os.utime(path, ns=(LONG_AGO, path.stat().st_mtime_ns))
    before = written(server)
    seen = {path: path.stat().st_atime_ns for path in secrets}
    asked, answers, crawled = {}, {}, set()

    def ask(graph, kind, changes):
        """Queue a node with some of its inputs changed."""
        changed = {**graph, "node": {"class_type": kind, "inputs": {**graph["node"]["inputs"], **changes}}}
        status, ticket = submit(server, changed)
        answers[status] = answers.get(status, 0) + 1
        told = (kind, ", ".join(changes), ascii(list(changes.values()))[:80])
        assert status in (200, 400), (*told, status)
        if ticket:
            asked[ticket] = told

    for kind in kinds:
        graph = good_graph(info, kind)
        if graph is None or kind == "QRLoRATrain":
            continue
        crawled.add(kind)
        inputs = inputs_of(info, kind)
        for name, (what, settings) in inputs.items():
            for value in hostile_values(what, settings, outside):
                if not (kind == DRAWS and passes(name, what, value)):
                    ask(graph, kind, {name: value})
        if kind == DRAWS:
            for changes in together(inputs, outside):
                ask(graph, kind, changes)
        emptied(server)
    entries = history(server, asked)
    check_failures(entries, asked)
    packed = [entries[ticket] for ticket, (kind, names, _) in asked.items() if kind == DRAWS and "," in names]
    assert len(packed) > 10 and all(error_of(entry) is None for entry in packed), "each value was read to the end"
    assert len(crawled) >= 20 and sum(answers.values()) > 700 and answers.get(400, 0) > 100, (crawled, answers)
    assert any(entry["status"]["status_str"] == "success" for entry in entries.values())
    check_outside(server, before, seen)
    server.queue(workflow(0.77, 0.66))


def check_failures(entries, asked):
    """Everything that failed while it ran failed with an error of ours that says something."""
    raw = []
    for ticket, entry in entries.items():
        failed = error_of(entry)
        if failed is None:
            continue
        where, kind, message = failed
        if where == "node" and kind not in REFUSALS:
            raw.append((asked[ticket], kind, message[:300]))
        assert len(message) < 8000, (asked[ticket], len(message))
    assert not raw, json.dumps(raw, indent=1)


def check_outside(server, before, seen):
    """Nothing outside was made, changed or read, and no adapter of there is anybody's now."""
    after = written(server)
    changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    assert not changed, changed
    if reading_shows(server.base.parent):
        touched = [path for path, when in seen.items() if path.stat().st_atime_ns != when]
        assert not touched, touched


def reading_shows(folder: Path) -> bool:
    """Whether this file system notes when a file is read."""
    path = folder / "noted"
    path.write_bytes(b"x")
    os.utime(path, ns=(LONG_AGO, path.stat().st_mtime_ns))
    before = path.stat().st_atime_ns
    path.read_bytes()
    after = path.stat().st_atime_ns
    path.unlink()
    return before != after


NUMBERS = (float("nan"), float("inf"), float("-inf"))


@pytest.mark.parametrize("kind,factor", [("QRLoRAApply", "strength"), ("QRLoRACreateHook", "strength")])
@pytest.mark.parametrize("number", NUMBERS)
def test_strengths_that_are_no_numbers(server, kind, factor, number):
    """NaN passes the host's range check."""
    graph = {key: WORKFLOW[key] for key in ("1", "2")}
    more = {"model": ["1", 0]} if kind == "QRLoRAApply" else {}
    graph["node"] = node(kind, delta_r=["2", 0], **{factor: number}, **more)
    graph["shown"] = node("PreviewAny", source=["node", 0])
    status, ticket = submit(server, graph)
    if status == 400:  # the host says so itself: infinity is beyond its range
        assert number == number
        return
    where, raised, message = error_of(drained(server, [ticket])[ticket])
    assert (where, raised) == ("node", "SettingError") and "strength is " in message and "a finite number" in message


def test_what_comes_out_of_a_wildcard_is_looked_at(server):
    """The type of such a link says nothing, so anything may come."""
    graph = {key: WORKFLOW[key] for key in ("1", "2")}
    graph["any"] = node("QRLoRATestAny", what="a text")
    graph["node"] = node("QRLoRAApply", model=["1", 0], delta_r=["any", 0], strength=1.0)
    graph["shown"] = node("PreviewAny", source=["node", 0])
    _, ticket = submit(server, graph)
    where, raised, message = error_of(drained(server, [ticket])[ticket])
    assert (where, raised) == ("node", "SettingError")
    assert "delta_r is 'a text', expected a \u0394R adapter or merge: connect Load \u0394R Adapter" in message


def test_no_input_of_train_does_harm(fake, outside):
    """The trainer is the fake one; a value that is fine starts it, so only those of names and prompts are tried."""
    server = fake
    before = written(server)
    asked, tickets = {}, []
    names = ("model_name", "dataset", "output_name", "trigger", "instance_prompt", "rank", "steps", "alpha", "seed")
    paths = [path.replace("{out}", str(outside)) for path in PATHS]
    for name in names:
        values = paths if name in ("model_name", "dataset", "output_name") else ["\ud800", "\0", 10**400, None, []]
        for value in [*values, float("nan")]:
            graph = light_graph("crawled", **{"steps": 1, name: value})
            status, ticket = submit(server, graph)
            assert status in (200, 400), (name, ascii(value)[:80], status)
            if ticket:
                asked[ticket] = ("QRLoRATrain", name, ascii(value)[:80])
                tickets.append(ticket)
    entries = drained(server, tickets)
    raw = []
    for ticket, entry in entries.items():
        failed = error_of(entry)
        if failed and failed[0] == "train" and failed[1] not in REFUSALS:
            raw.append((asked[ticket], failed))
    assert not raw, raw[:5]
    check_outside(server, before, {})
