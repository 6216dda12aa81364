"""What the nodes report is among the sentences that the page can say in other languages."""

import ast
import json
import re

import pytest

import qrlora_core as core
from qrlora_plots import contact_sheet
from tests.core.test_merge import make, of
from tests.nodes.pack import ROOT, load

REPORTS = json.loads((ROOT / "web" / "qrlora_reports.json").read_text(encoding="utf-8"))
NUMBER = re.compile(r"\{\w+\}")
# Lines that are names and numbers, or words that a graph is written in
DATA = re.compile(
    r"a\d|[-\d.]+ x a\d.*|alpha [\d., ]+|beta [\d., ]+|by prompt.*|(double|single|attention|feed_forward) .*"
)


def patterns(language="ja"):
    return [re.compile(".+?".join(map(re.escape, NUMBER.split(english)))) for english in REPORTS[language]]


KNOWN = patterns()


def unknown(text):
    lines = [line for line in text.split("\n") if line and not DATA.fullmatch(line)]
    return [line for line in lines if not any(one.fullmatch(line) for one in KNOWN)]


def merged(mode="stack", basis=0, **adapter):
    return core.merge(of(make(1)), 0.9, of(make(2, basis_seed=basis, **adapter)), 1.0, on_basis_mismatch=mode)


def merge_lines(recipe, missing=()):
    return load("report").merge_text(recipe, core.merge_report(recipe), missing)


def sheet():
    from PIL import Image

    labels = [core.sweep(of(make(1)), "0, 1", of(make(2)), "0, 1")[index].label for index in range(4)]
    return contact_sheet([Image.new("RGB", (32, 32))] * 4, labels)


def scale(text="0: 0.5"):
    return core.BlockScale(double_ranges=core.parse_ranges(text, "double_ranges"))


CASES = {
    "adapter": lambda report: report.adapter_text(make(1)),
    "full QR": lambda report: report.adapter_text(
        core.Adapter("x", "qr", make(1).layers, make(1).layer, has_initial=False, metadata={"qrlora.trigger": "<c>"})
    ),
    "one basis": lambda report: merge_lines(merged()),
    "two bases": lambda report: merge_lines(merged(basis=1)),
    "aligned": lambda report: merge_lines(merged("align", 1)),
    "nothing": lambda report: merge_lines(core.NOTHING, ["style", "content"]),
    "off": lambda report: merge_lines(merged().block_scaled(core.BlockScale(double=0.0))),
    "by the prompt": lambda report: merge_lines(core.merge_acting(of(make(1)), 1, of(make(2)), 1, act="by prompt")),
    "blocks": lambda report: report.block_text(scale(), of(make(1)).block_scaled(scale())),
    "beyond": lambda report: report.block_text(scale("0-9: 0"), of(make(1)).block_scaled(scale("0-9: 0"))),
    "no blocks": lambda report: report.block_text(scale(), core.NOTHING),
    "schedule": lambda report: report.schedule_text(core.parse_schedule("0: 1, 1: 0"), of(make(1))),
    "sigma": lambda report: report.schedule_text(core.parse_schedule("1: 1, 0: 0", "sigma"), of(make(1))),
    "hook": lambda report: report.hook_text(of(make(1)), 1.0, 1),
    "hooks": lambda report: report.hook_text(of(make(1)), 1.0, 2),
    "no hook": lambda report: report.hook_text(core.NOTHING, 1.0, 2),
    "sweep": lambda report: report.sweep_text(core.sweep(of(make(1)), "0, 1", of(make(2)), "1"), "by prompt"),
    "sheet": lambda report: report.sheet_text(sheet(), "sheet_00001_.png"),
    "similarity": lambda report: report.similarity_text(core.similarity_report(make(1), make(2))),
    "others": lambda report: report.similarity_text(core.similarity_report(make(1), make(2, basis_seed=1, rank=4))),
}


@pytest.mark.parametrize("case", CASES)
def test_a_report_is_known(case):
    text = CASES[case](load("report"))
    assert text and unknown(text) == []


def test_what_was_saved_is_known(tmp_path):
    report = load("report")
    for _ in range(2):
        assert unknown(report.saved_text(core.save_once(make(1), tmp_path, "one"), "one.safetensors", "a/b")) == []
    many = core.Saved(tmp_path / "one.safetensors", True, 9)
    assert unknown(report.saved_text(many, "one.safetensors", "a/b")) == []


def told(path, function):
    """The texts that a file hands to a function of this name, values as 7."""
    for call in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(call, ast.Call) and getattr(call.func, "attr", getattr(call.func, "id", "")) == function:
            for text in call.args:
                if isinstance(text, ast.JoinedStr):
                    yield "".join(str(part.value) if isinstance(part, ast.Constant) else "7" for part in text.values)
                elif isinstance(text, ast.Constant) and " " in str(text.value):
                    yield str(text.value)


def test_what_a_training_tells_is_known():
    texts = [text for text in told("nodes/training/service.py", "tell") if text != "7: 7"]  # an error
    assert len(texts) > 6 and [line for text in texts for line in unknown(text)] == []


def test_a_line_that_nobody_translated_is_found():
    assert unknown("12 layers were lost at sea") == ["12 layers were lost at sea"]
