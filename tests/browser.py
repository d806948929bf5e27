"""A headless Chromium for the tests of pages."""

import contextlib
import os
import shutil
from pathlib import Path

import pytest


_OPTIONS = (
    "headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "disable-quic", "no-first-run",
    "disable-background-networking", "disable-component-update", "disable-sync",
)  # fmt: skip


@contextlib.contextmanager
def chromium(profile: Path):
    """Yields a driver (selenium) whose performance log holds the network's events.

    Args:
        profile: an empty directory for what the browser keeps.
    """
    from selenium import webdriver

    browser = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        told = "the tests of pages need Chromium and its driver: apt install chromium chromium-driver"
        pytest.fail(told) if os.environ.get("HF_SIRIUS_NEEDS_BROWSER") else pytest.skip(told)
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    for option in (*_OPTIONS, f"user-data-dir={profile}"):
        options.add_argument(f"--{option}")
    page = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield page
    finally:
        page.quit()


def set_screen(page, width: int, height: int = 800, scheme: str = "light") -> None:
    """Gives the page a size in CSS pixels, and the reader's wish for `light` or `dark`."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    page.execute_cdp_cmd("Emulation.setFocusEmulationEnabled", {"enabled": True})
