"""A headless Chromium that has no network, and what it says of a page."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

_OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-component-update",
    "--disable-background-networking", "--disable-sync", "--window-size=1400,900",
    "--host-resolver-rules=MAP * ~NOTFOUND",
)  # fmt: skip


class Browser:
    """One window, driven by selenium."""

    def __init__(self, profile: Path) -> None:
        """Args: profile: an empty folder. Skips the test, and says what is missing, where there is no browser."""
        selenium = pytest.importorskip("selenium", reason='needs selenium: pip install -e ".[dev]"')
        binary = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        driver = shutil.which("chromedriver")
        if binary is None or driver is None:
            missing = "chromium" if binary is None else "chromedriver"
            pytest.skip(f"needs {missing}: apt-get install chromium chromium-driver")
        from selenium import webdriver

        assert selenium
        options = webdriver.ChromeOptions()
        options.binary_location = binary
        for option in (*_OPTIONS, f"--user-data-dir={profile}"):
            options.add_argument(option)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
        self.driver.execute_cdp_cmd("Network.enable", {})
        offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
        self.driver.execute_cdp_cmd("Network.emulateNetworkConditions", offline)

    def open(self, page: Path) -> None:
        """Open a report and wait until it is drawn."""
        self.driver.get("about:blank")
        for kind in ("browser", "performance"):
            self.driver.get_log(kind)  # which forgets what came before
        self.driver.get(page.as_uri())
        self.until("return document.documentElement.dataset.ready === 'yes'")

    def run(self, script: str, *arguments: Any) -> Any:
        """What a script returns, or resolves to."""
        return self.driver.execute_script(script, *arguments)

    def until(self, script: str, *arguments: Any, seconds: float = 60) -> Any:
        """What a script returns once that is true."""
        end = time.monotonic() + seconds
        while not (value := self.run(script, *arguments)):
            assert time.monotonic() < end, f"{script} stays {value!r}; console: {self.console()}"
            time.sleep(0.05)
        return value

    def choose(self, select: str, value: str) -> None:
        """Choose an option as a person does."""
        self.run(
            "const s = document.getElementById(arguments[0]); s.value = arguments[1];"
            "s.dispatchEvent(new Event('input')); s.dispatchEvent(new Event('change'))",
            select,
            value,
        )

    def scheme(self, name: str) -> None:
        """``light`` or ``dark``."""
        features = [{"name": "prefers-color-scheme", "value": name}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def console(self) -> list[str]:
        """Messages since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Addresses asked for since the last call; those with the data in them are not addresses."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return [url for url in sent if not url.startswith("data:")]

    def close(self) -> None:
        """End the browser."""
        self.driver.quit()
