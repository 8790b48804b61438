"""Chromium without a window, for tests of pages."""

import os
import shutil
from contextlib import contextmanager

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


@contextmanager
def browser(dark=False):
    """A browser; skips where there is none, but for CI, which must have one."""
    if not (CHROMIUM and DRIVER):
        reason = "needs chromium and chromedriver (Debian: chromium, chromium-driver)"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1180,720"):
        options.add_argument(argument)
    if dark:
        options.add_argument("--force-dark-mode")
    driver = webdriver.Chrome(options, Service(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


def until(condition, seconds=30):
    """Waits for a condition."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(None, seconds, 0.2).until(lambda _: condition())
