"""A headless Chromium that says what a page did: its errors, requests, and what it looks like."""

import json
import os
import shutil
import tempfile
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium")
ARTEFACTS = Path(__file__).parents[2] / "build" / "screenshots"
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
DRAWN = "return document.querySelectorAll('[data-spec]:not([data-drawn])').length === 0"


def needs_chromium() -> str | None:
    """Why there is no browser to test with; an error where one was promised."""
    if CHROMIUM and shutil.which("chromedriver"):
        return None
    assert not os.environ.get("NEARFAR_NEEDS_CHROMIUM"), "chromium and chromedriver are missing"
    return "chromium and chromedriver are not installed"


class Page:
    """A page that is open in the browser."""

    def __init__(self, driver) -> None:
        self.driver = driver

    def open(self, path: Path | str, *, width: int = 1280, dark: bool = False) -> None:
        """Open a file, or an address."""
        self.resize(width)
        self.media(dark=dark)
        self.driver.get_log("browser"), self.driver.get_log("performance")  # of the page before
        self.driver.get(path if isinstance(path, str) else path.resolve().as_uri())
        self.wait(DRAWN)

    def wait(self, code: str) -> None:
        """Wait until a script returns true."""
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.driver, 30).until(lambda driver: driver.execute_script(code))

    def resize(self, width: int) -> None:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def media(self, *, dark: bool) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})

    def script(self, code: str, *arguments):
        return self.driver.execute_script(code, *arguments)

    def move(self, selector: str, value: float) -> None:
        """Move a slider as a hand does."""
        self.script(
            "const slider = document.querySelector(arguments[0]); slider.value = arguments[1];"
            "slider.dispatchEvent(new Event('input', {bubbles: true}))",
            selector,
            value,
        )

    def text(self, selector: str) -> str:
        return self.script("return document.querySelector(arguments[0]).textContent", selector)

    def faults(self, without: str = "#nothing") -> tuple[list[tuple[str, str]], int]:
        """What breaks the rules of accessibility that matter, and how many rules are kept."""
        import axe_core_python

        axe = Path(axe_core_python.__file__).parent / "axe.min.js"
        self.script(axe.read_text(encoding="utf-8"))
        found = self.driver.execute_async_script(
            "const [without, done] = arguments;"
            "axe.run({exclude: [[without]]})"
            ".then(done, error => done({violations: [{id: String(error), nodes: [{html: ''}]}]}))",
            without,
        )
        serious = [
            (fault["id"], fault["nodes"][0]["html"])
            for fault in found["violations"]
            if fault.get("impact") not in ("minor", "moderate")
        ]
        return serious, len(found.get("passes", ()))

    def errors(self) -> list[str]:
        """What the console complains about."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Addresses asked for, but the page itself and what is inside it."""
        messages = [
            json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")
        ]
        addresses = [
            message["params"]["request"]["url"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        ]
        here = self.driver.current_url.partition("#")[0]
        return [a for a in addresses if not a.startswith("data:") and a.partition("#")[0] != here]

    def screenshot(self, name: str) -> Path:
        """The whole page, kept to be looked at."""
        ARTEFACTS.mkdir(parents=True, exist_ok=True)
        path = ARTEFACTS / f"{name}.png"
        whole = {"captureBeyondViewport": True, "format": "png"}
        path.write_bytes(self._held("Page.captureScreenshot", whole))
        return path

    def print(self, name: str) -> Path:
        ARTEFACTS.mkdir(parents=True, exist_ok=True)
        path = ARTEFACTS / f"{name}.pdf"
        path.write_bytes(self._held("Page.printToPDF", {"printBackground": False}))
        return path

    def _held(self, command: str, settings: dict) -> bytes:
        return b64decode(self.driver.execute_cdp_cmd(command, settings)["data"])


@contextmanager
def browser() -> Iterator[Page]:
    """A browser with a profile of its own."""
    if reason := needs_chromium():
        pytest.skip(reason)
    from selenium import webdriver

    with tempfile.TemporaryDirectory() as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        service = webdriver.ChromeService(shutil.which("chromedriver"))
        driver = webdriver.Chrome(options, service)
        try:
            yield Page(driver)
        finally:
            driver.quit()
