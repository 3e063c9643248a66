"""Makes demo.png: the page of ``igpt demo`` in the middle of a drawing. Needs the extra dev, and Debian's chromium.

``python docs/make_demo_picture.py``
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import expect, sync_playwright

# The rest of the drawing is not shown, nor that it has ended; and nothing moves.
HALF_DRAWN = """
const drawn = grow, row = Math.floor(0.75 * H);
grow = (shots, line) => { if (line.row < row) drawn(shots, line); };
finish = () => { progress(0.43); document.body.dataset.drawn = "yes"; };
busy = (was => on => on && was(on))(busy);
const remove = DOMTokenList.prototype.remove;
DOMTokenList.prototype.remove = function (name) { if (name !== "drawing") remove.call(this, name); };
HTMLElement.prototype.scrollIntoView = () => {};
0;
"""


def main() -> None:
    command = (sys.executable, "-m", "igpt_fast", "demo", "--port", "0", "--no-browser")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server, sync_playwright() as playwright:
        assert server.stdout is not None
        (address,) = re.findall(r"http://\S+", server.stdout.readline())
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1240, "height": 900})
        page.goto(address)
        page.wait_for_selector("body[data-ready]")
        page.click("#examples button >> nth=1")
        for name, value in {"keep": "9", "n": "8", "temperature": "0.9", "seed": "5"}.items():
            page.locator(f"#{name}").fill(value)
        page.evaluate(HALF_DRAWN)
        page.click("#go")
        expect(page.locator("body[data-drawn]")).to_be_attached()
        page.wait_for_timeout(300)  # the bar
        page.screenshot(path=Path(__file__).with_name("demo.png"))
        browser.close()
        server.send_signal(signal.SIGINT)


if __name__ == "__main__":
    main()
