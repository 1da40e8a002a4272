"""Take the picture of the console that README.md shows: python tests/take_console_picture.py (wants Chromium)."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import requests
from playwright.sync_api import sync_playwright

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
from support import ROOT, Api, Sink, process  # noqa: E402


def main() -> None:
    """Let jobs run for as long as the chart reaches back, then look at one of them."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    command = [sys.executable, str(ROOT / "examples" / "slow_api.py"), "--port", "0"]
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as third_party,
        sync_playwright() as playwright,
        Sink() as sink,
    ):
        try:
            assert third_party.stdout is not None
            weather = third_party.stdout.readline().split()[-1].rstrip("/")
            env = {f"ASTERA_FLOW_{name}_URL": weather for name in ("GEOCODING", "WEATHER")}
            shutil.copytree(ROOT / "flows", Path(folder) / "flows")
            with process(Path(folder), env=env) as (_, url, _):
                page = playwright.chromium.launch(executable_path=chromium).new_page(
                    viewport={"width": 1280, "height": 800}, color_scheme="light"
                )
                page.goto(url)
                api = Api(url)
                order = {"customer": "Ada", "items": [{"sku": "plum", "quantity": 1}]}
                api.submit("/slow", seconds=600)
                for turn in range(200):
                    for _ in range(round(6 + 5 * random.random())):
                        api.submit("/hello", name="Ada")
                    if turn % 40 == 0:
                        requests.post(f"{url}/api/publishingAsync/orders", json=order, timeout=10)
                    page.wait_for_timeout(500)
                sink.answers = [503]
                job = api.submit("/weather/Berlin", days=5, callbackUrl=f"{sink.url}/weather-is-there")
                api.finished(job)
                sink.next()
                page.goto(f"{url}/#/jobs/{job}")
                page.get_by_text("1 attempt").wait_for()
                page.wait_for_timeout(2500)
                page.screenshot(path=str(ROOT / "docs" / "console.png"))
                api.session.close()
        finally:
            third_party.kill()


if __name__ == "__main__":
    main()
