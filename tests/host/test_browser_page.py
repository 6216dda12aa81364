"""The page that the tests of the browser share is, after any of them, what a newly opened one is."""

import pytest
from selenium.common.exceptions import JavascriptException

from demo.workflow import editable
from tests.host import browser
from tests.host.training import node, train_graph

pytestmark = pytest.mark.skipif(browser.find_chromium() is None, reason=browser.HOW_TO)

TOAST = "document.body.textContent.includes('a toast of a test')"
# What a test could leave behind; of the settings those that the server keeps and those that the page has.
STATE = f"""
    const {{ setting, workflow, sidebarTab }} = app.extensionManager;
    const {{ api }} = window.comfyAPI.api;
    return {{
      open: workflow.openWorkflows.length, modified: workflow.activeWorkflow.isModified,
      root: app.canvas.graph === app.graph,
      nodes: app.graph.nodes.length, links: Object.keys(app.graph.serialize().links).length,
      subgraphs: app.graph.subgraphs.size, outputs: Object.keys(app.nodeOutputs).length,
      selected: Object.keys(app.canvas.selected_nodes).length,
      scale: app.canvas.ds.scale, offset: [...app.canvas.ds.offset],
      side: sidebarTab.activeSidebarTabId, properties: !!document.querySelector("[data-testid=properties-panel]"),
      dialogs: document.querySelectorAll("[role=dialog]").length, drawn: document.querySelectorAll(".lg-node").length,
      toast: {TOAST},
      panels: document.querySelectorAll("[data-qrlora-train]").length,
      own: Object.hasOwn(api, "fetchApi") || "qrloraTest" in window,
      dark: getComputedStyle(document.body).getPropertyValue("--bg-color"),
      settings: arguments[0].map((name) => setting.get(name)),
    }};
"""


def state(page):
    return page.js(STATE, list(browser.DEFAULTS))


def leave_things_behind(page):
    """One of everything that tests do to a page."""
    graph = train_graph("left") | {"preview": node("PreviewAny", source=["train", 4])}
    page.load(editable(graph, page.server.get("/object_info")))
    page.js(
        """
        const [settings] = arguments;
        window.qrloraTest = { posted: [1] };
        window.comfyAPI.api.api.fetchApi = () => Promise.reject(new Error("a test's own"));
        app.canvas.ds.scale = 0.5;
        app.canvas.ds.offset = [11, 12];
        const train = app.graph.nodes.find((one) => one.type === "QRLoRATrain");
        app.nodeOutputs[train.id] = { text: ["left"] };
        app.canvas.graph.convertToSubgraph(new Set([train]));
        const host = app.graph.nodes.find((one) => one.subgraph);
        app.canvas.openSubgraph(host.subgraph, host);
        app.canvas.selectNode(host.subgraph.nodes[0]);
        app.extensionManager.toast.add({ severity: "error", summary: "left", detail: "a toast of a test" });
        app.extensionManager.sidebarTab.activeSidebarTabId = "node-library";
        console.error("qrlora: left");
        const { setting, command } = app.extensionManager;
        delete window.comfyAPI.api.api.fetchApi;
        const change = async () => {
          for (const [name, value] of Object.entries(settings)) await setting.set(name, value);
          window.comfyAPI.api.api.fetchApi = () => Promise.reject(new Error("a test's own"));
          command.execute("Comfy.ShowSettingsDialog");
          return null;
        };
        return change();
        """,
        {
            "Comfy.VueNodes.Enabled": True,
            "Comfy.ColorPalette": "light",
            "Comfy.RightSidePanel.IsOpen": True,
            "QRLoRA.ApplyMode": "live",
            "QRLoRA.MemoryPreset": "12 GB",
            "QRLoRA.Folder": "models/loras",
        },
    )
    page.wait("return document.querySelectorAll('[role=dialog]').length")
    page.wait(f"return {TOAST}")


def test_a_page_that_is_used_again_is_as_new(server, page):
    page.fresh().js("window.stillHere = true; delete window.app")
    with pytest.raises(JavascriptException):
        page.fresh()
    new = state(page.fresh())
    assert not page.js("return window.stillHere ?? false"), "a page that could not be made as new is loaded anew"
    assert new["open"] == 1 and not new["nodes"] and new["settings"] == list(browser.DEFAULTS.values())
    page.js("window.stillHere = true")
    leave_things_behind(page)
    left = state(page)
    assert not [name for name in new if left[name] == new[name]], "these were to be other ones"
    page.fresh()
    page.wait(f"return !{TOAST}", 10)  # it fades
    assert state(page) == new
    assert page.js("return window.stillHere") and page.errors() == []
    stored = server.get("/settings")
    assert {name: stored[name] for name in browser.DEFAULTS} == browser.DEFAULTS
