"""The page of `peft-dynamic app` in a browser: two visitors at once, and no request that leaves the machine."""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli import common, test_page
from tests.cli.test_chat import expected

selenium = pytest.importorskip("selenium", reason="needs selenium and Chromium")
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

elsewhere, tiny, run, address = common.elsewhere, common.tiny, test_page.run, test_page.address  # fixtures
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.skipif(DRIVER is None, reason="needs the packages chromium and chromium-driver"),
    pytest.mark.filterwarnings("ignore:.*:ResourceWarning"),  # selenium's own sockets
]
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"),
    *("--window-size=1200,1300", "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"),
)


@pytest.fixture
def visitors() -> Iterator[list[Any]]:
    opened: list[Any] = []
    try:
        for _ in range(2):
            options = webdriver.ChromeOptions()
            for flag in FLAGS:
                options.add_argument(flag)
            options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
            opened.append(webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER)))
        yield opened
    finally:
        for each in opened:
            each.quit()


def until(holds: Callable[[], Any], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            if holds():
                return
        except Exception:  # not there yet, or drawn anew meanwhile
            if time.monotonic() > end:
                raise
        assert time.monotonic() < end
        time.sleep(0.1)


def shown(page: Any, name: str) -> str:
    return page.find_element(By.CSS_SELECTOR, f"#{name} textarea").get_attribute("value")


def slide(page: Any, name: str, value: int) -> None:
    box = page.find_element(By.CSS_SELECTOR, f"#{name} input[type=number]")
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys(str(value), Keys.TAB)


def test_two_visitors(tiny: Path, run: Path, address: str, visitors: list[Any], tmp_path: Path) -> None:
    settings = [(1, 2, "rank 1: loss 2"), (4, 1, "rank 4: loss 1.25")]
    for page, (rank, depth, _) in zip(visitors, settings, strict=True):
        page.get(address)
        until(lambda page=page: page.find_element(By.CSS_SELECTOR, "#prompt textarea"))
        slide(page, "rank", rank)
        slide(page, "depth", depth)
        page.find_element(By.CSS_SELECTOR, "#prompt textarea").send_keys("say one")
    for page in visitors:
        page.find_element(By.ID, "ask").click()
    for page, (rank, depth, marked) in zip(visitors, settings, strict=True):
        wanted = [expected(tiny, run / "adapter", "say one\n", each, depth) for each in (rank, None)]
        until(lambda page=page, wanted=wanted: [shown(page, "adapter"), shown(page, "base")] == wanted)
        until(lambda page=page: "a second" in page.find_element(By.ID, "adapter-speed").text)
        until(lambda page=page, marked=marked: marked in page.find_element(By.ID, "curve").text)
        where = Path(os.environ.get("PEFT_DYNAMIC_SCREENSHOTS", tmp_path))
        assert page.save_screenshot(str(where / f"rank-{rank}.png"))
        assert [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"] == []
        told = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
        sent = [each["params"]["request"]["url"] for each in told if each["method"] == "Network.requestWillBeSent"]
        assert [url for url in sent if not url.startswith((address, "data:"))] == []
        assert len(sent) > 5
