"""Chromium without a window, driven by its own driver; nothing is downloaded."""

import base64
import io
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

QUIET = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--no-first-run", "--hide-scrollbars",
)  # fmt: skip

MILLIMETRES = 25.4


class Browser:
    """A page that is open, what the console said of it, and what it asked the net for."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, page: Path, *, width: int = 1400, dark: bool = False) -> None:
        """Opens the page as a screen of this width shows it."""
        self.screen(width, dark=dark)
        self.driver.get_log("performance"), self.driver.get_log("browser")
        self.driver.get("about:blank")
        self.driver.get(page.as_uri())
        self._wait_for_page()

    def screen(self, width: int, *, dark: bool = False) -> None:
        """A screen of this width from now on, of a phone where it is narrow."""
        self._tell("Emulation.setDeviceMetricsOverride", width=width, height=900,
                   deviceScaleFactor=1, mobile=width < 600)  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._tell("Emulation.setEmulatedMedia", features=[scheme])

    def run(self, script: str, *arguments: Any) -> Any:
        """What the body of a function returns; it may wait with `await`."""
        inside = f"const done = arguments[arguments.length - 1]; (async (...args) => {{{script}}})"
        return self.driver.execute_async_script(
            f"{inside}(...[...arguments].slice(0, -1)).then(done, (e) => done(`failed: ${{e}}`));",
            *arguments,
        )

    def mouse(self, *kinds: str, x: float, y: float) -> None:
        """What a hand does at a place of the window, such as "moved", "pressed", "released"."""
        for kind in kinds:
            button = {} if kind == "moved" else {"button": "left", "clickCount": 1}
            self._tell("Input.dispatchMouseEvent", type=f"mouse{kind.capitalize()}", x=x, y=y,
                       buttons=int(kind == "pressed"), **button)  # fmt: skip

    def pixels(self, left: float, top: float, width: float, height: float) -> NDArray[np.uint8]:
        """What a rectangle of the window shows, as UInt8[row, column, colour]."""
        clip = {"x": left, "y": top, "width": width, "height": height, "scale": 1}
        told = self._tell("Page.captureScreenshot", format="png", clip=clip)
        drawn = Image.open(io.BytesIO(base64.b64decode(told["data"]))).convert("RGB")
        return np.asarray(drawn)

    def console(self) -> list[str]:
        """What went wrong, by the console."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """The addresses that were asked for, but for the page itself and what it holds."""
        entries = self.driver.get_log("performance")
        told = [json.loads(entry["message"])["message"] for entry in entries]
        asked = [
            event["params"]["request"]["url"]
            for event in told
            if event["method"] == "Network.requestWillBeSent"
        ]
        return [url for url in asked if not re.match(r"data:|about:|blob:", url)]

    def printed(self) -> bytes:
        """The page as a PDF, on paper of A4."""
        told = self._tell("Page.printToPDF", printBackground=True, preferCSSPageSize=True,
                          paperWidth=210 / MILLIMETRES, paperHeight=297 / MILLIMETRES)  # fmt: skip
        return base64.b64decode(told["data"])

    def _wait_for_page(self) -> None:
        """On a busy machine a question may come to the blank page, or to half of the next one."""
        from selenium.webdriver.support.wait import WebDriverWait

        whole = "return document.readyState == 'complete' && document.URL != 'about:blank'"
        WebDriverWait(self.driver, 60).until(lambda driver: driver.execute_script(whole))

    def _tell(self, command: str, **how: Any) -> Any:
        return self.driver.execute_cdp_cmd(command, how)


@contextmanager
def browser() -> Iterator[Browser]:
    """A browser that is closed afterwards; the test is skipped where there is none."""
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        missing = "chromedriver" if chromium else "chromium"
        pytest.skip(f"{missing} is not on the path: no browser opens the page")
    options = selenium.ChromeOptions()
    options.binary_location = chromium
    for argument in QUIET:
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = selenium.ChromeService(driver)
    opened = selenium.Chrome(options=options, service=service)
    opened.set_script_timeout(60)
    try:
        yield Browser(opened)
    finally:
        opened.quit()


def words_of(pdf: bytes) -> list[str]:
    """The text on each page of a PDF without its blanks, which lines break."""
    pypdfium2 = pytest.importorskip("pypdfium2")
    # What lies beside the paper is in the file too.
    told = [
        page.get_textpage().get_text_bounded(*page.get_mediabox())
        for page in pypdfium2.PdfDocument(pdf)
    ]
    return [re.sub(r"\s+", "", words) for words in told]
