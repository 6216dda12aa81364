"""ComfyUI's real front end in a headless Chromium: found, started with a profile of its own, driven, ended."""

import json
import os
import shutil
import time
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.common.exceptions import JavascriptException, NoAlertPresentException
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from demo.server import Server

HOW_TO = (
    "no Chromium with its driver found: install them (Debian, Ubuntu: apt-get install chromium chromium-driver), "
    "or set CHROMIUM and CHROMEDRIVER to their paths"
)
QUIET = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage", *QUIET)
# The front end's own greetings would cover the graph, and its map is drawn anew with every change of the graph.
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Workflow.WarnBlueprintOverwrite": False,
    "Comfy.Minimap.Visible": False,
}
# What tests change, as it is before any of them.
DEFAULTS = {
    "Comfy.VueNodes.Enabled": False,
    "Comfy.ColorPalette": "dark",
    "Comfy.Locale": "en",
    "Comfy.RightSidePanel.IsOpen": False,
    "QRLoRA.ApplyMode": "auto",
    "QRLoRA.MemoryPreset": "auto",
    "QRLoRA.Folder": "output/qrlora",
}
LOADING = ("Comfy.Locale",)  # a page that speaks another language makes its workflow anew, at a time of its own
POLL = 0.05  # seconds between two looks at the page
# The state of a page that was just opened, but for its settings: resolves to what is still open.
TIDY = """
    const [settings] = arguments;
    const { setting, workflow, sidebarTab, toast, command } = app.extensionManager;
    const tidy = async () => {
      delete window.qrloraTest;
      delete window.comfyAPI.api.api.fetchApi; // a test's own in front of that of the class
      for (const [name, value] of Object.entries(settings)) {
        if (setting.get(name) !== value) await setting.set(name, value);
      }
      sidebarTab.activeSidebarTabId = null;
      (toast.dismissAll ?? toast.removeAll).call(toast); // its name in newer front ends, and in older ones
      await command.execute("Comfy.NewBlankWorkflow");
      for (const one of [...workflow.openWorkflows]) {
        if (one !== workflow.activeWorkflow) await workflow.closeWorkflow(one);
      }
      app.canvas.ds.reset();
      return null;
    };
    return tidy();
"""
AS_NEW = """
    return app.canvas.graph === app.graph && !app.graph.nodes.length && !Object.keys(app.nodeOutputs).length
      && app.extensionManager.workflow.openWorkflows.length === 1 && !document.querySelector("[role=dialog]")
      && Object.entries(arguments[0]).every(([name, value]) => app.extensionManager.setting.get(name) === value);
"""


def find_chromium() -> tuple[str, str] | None:
    """Paths of browser and driver: CHROMIUM and CHROMEDRIVER, or what is on PATH; None unless both are there."""
    browsers = (os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome", "chrome")
    drivers = (os.environ.get("CHROMEDRIVER"), "chromedriver")
    found = [next(filter(None, map(shutil.which, filter(None, names))), None) for names in (browsers, drivers)]
    return (found[0], found[1]) if found[0] and found[1] else None


def set_settings(server: Server, settings: dict[str, Any]) -> None:
    """What the front end reads when it loads."""
    body = json.dumps({**SETTINGS, **settings}).encode()
    request = urllib.request.Request(f"{server.url}/settings", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30):
        pass


class Page:
    """One browser window on one server.

    Raises:
        TimeoutError: from `wait` and from what waits, with what the page shows then.
    """

    def __init__(self, server: Server, driver: webdriver.Chrome) -> None:
        self.server, self.driver = server, driver
        self._loaded: dict[str, Any] | None = None  # its LOADING settings; None: load it anew before it is used again

    def open(self, address: str = "") -> "Page":
        """Load the page anew, as a reload does, and wait until it has brought back what was open."""
        self.driver.get(self.server.url + address)
        with suppress(NoAlertPresentException):
            self.driver.switch_to.alert.accept()  # "leave the page?"
        # The spinner is there before the graph is, and goes when the last workflow is back: one that is put into the
        # page before that would be replaced by it.
        self.wait("return !!window.app?.graph && !!app.canvas && app.extensionManager?.spinner === false", 180)
        return self

    def fresh(self, settings: dict[str, Any] | None = None) -> "Page":
        """A page as a new visitor gets it, with one empty workflow, loaded anew only where that is needed.

        Args:
            settings: what differs from the defaults.
        """
        self.errors()  # of what was before
        wanted = {**DEFAULTS, **(settings or {})}
        loading = {name: wanted[name] for name in LOADING}
        reused, self._loaded = self._loaded == loading, None
        if not reused:
            set_settings(self.server, wanted)
            self.open()
        self.js(TIDY, wanted)
        until = time.monotonic() + 30
        while not self.js(AS_NEW, wanted) and time.monotonic() < until:
            ActionChains(self.driver).send_keys(Keys.ESCAPE).perform()  # closes the dialog that is on top
            time.sleep(POLL)
        self.wait(AS_NEW, 1, wanted)
        self._loaded = loading
        return self

    def spoil(self) -> None:
        """Load the page anew before it is used again: what its scripts keep would disturb the next test."""
        self._loaded = None

    def rest(self) -> None:
        """Leave the page, which costs time even when nobody looks at it."""
        if self._loaded:
            self.driver.get("about:blank")
        self.spoil()

    def load(self, workflow: dict[str, Any]) -> None:
        """Put a workflow in the place of the open one; without an id it gets a new one, as a new tab does."""
        workflow = {"id": str(uuid.uuid4()), **workflow}
        self.js("return app.loadGraphData(arguments[0]).then(() => null)", workflow)
        self.wait(
            "return app.canvas.graph === app.graph && app.graph.nodes.length === arguments[0]"
            " && app.graph.id === arguments[1]",
            30,
            len(workflow["nodes"]),
            workflow["id"],
        )

    def load_template(self, name: str) -> None:
        """Open one of the pack's templates, as the front end's own list of them does."""
        address = f"/api/workflow_templates/qr-lora/{urllib.parse.quote(name)}.json"
        self.js(
            "return fetch(arguments[0]).then((answer) => answer.json())"
            ".then((workflow) => app.loadGraphData(workflow, true, true, arguments[1])).then(() => null)",
            address,
            name,
        )

    def js(self, script: str, *arguments: Any) -> Any:
        """Run the body of a function; what it returns, awaited."""
        return self.driver.execute_script(script, *arguments)

    def wait(self, script: str, seconds: float = 30, *arguments: Any) -> Any:
        """Run the body of a function until it returns something true; that value."""
        until, error = time.monotonic() + seconds, ""
        while time.monotonic() < until:
            try:
                value = self.js(script, *arguments)
                if value:
                    return value
            except JavascriptException as raised:  # the page is not there yet
                error = str(raised.msg)
            time.sleep(POLL)
        shown = self.js("return document.querySelector('[data-qrlora-train]')?.innerText ?? document.body.innerText")
        raise TimeoutError(f"not within {seconds} s: {script}\n{error}\nthe page shows: {shown[:2000]}")

    def errors(self) -> list[str]:
        """What the console reported and comes from this pack's scripts; not what could not be downloaded."""
        entries = [entry for entry in self.driver.get_log("browser") if entry["source"] != "network"]
        ours = [entry["message"] for entry in entries if "qrlora" in entry["message"].lower()]
        # the host's own words about messages that come before it has loaded any extension
        return [message for message in ours if "Unknown message type" not in message]

    def screenshot(self, path: Path) -> Path:
        self.driver.save_screenshot(str(path))
        return path


@contextmanager
def browser(server: Server, profile: Path, size: tuple[int, int] = (1500, 1500)) -> Iterator[Page]:
    """A window over a new profile folder."""
    found = find_chromium()
    if found is None:
        raise FileNotFoundError(HOW_TO)
    options = Options()
    options.binary_location = found[0]
    for flag in (*FLAGS, f"--user-data-dir={profile}", f"--window-size={size[0]},{size[1]}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(found[1]))
    try:
        driver.set_script_timeout(60)
        yield Page(server, driver)
    finally:
        driver.quit()
