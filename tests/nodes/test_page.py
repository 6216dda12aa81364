"""The page's scripts against the nodes, as far as that needs no browser."""

import re

from tests.nodes.pack import ROOT


def reporting_nodes():
    """Ids of the nodes whose execution returns lines for the page."""
    for path in sorted((ROOT / "nodes").glob("*.py")):
        for body in re.split(r"^class ", path.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
            node = re.search(r'"(QRLoRA\w+)"', body)
            if node and re.search(r"ui=\{|return saved_output\(", body.split("\ndef ")[0]):
                yield node[1]


def test_every_node_that_reports_has_its_box_from_the_start():
    """Otherwise it would grow at its first run. Train has a panel of its own."""
    script = (ROOT / "web" / "qrlora.js").read_text(encoding="utf-8")
    listed = re.findall(r'"(\w+)"', re.search(r"const REPORTS = \[(.*?)\]\.map", script, re.DOTALL)[1])
    assert {f"QRLoRA{name}" for name in listed} == set(reporting_nodes()) - {"QRLoRATrain"}
