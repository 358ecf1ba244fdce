"""Takes the picture of the report that the documentation shows: on a desktop, and on a phone in its dark colours.

python scripts/screenshot_report.py         needs a Chromium (or CHROME=/path/to/one); writes docs/images/report.png
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from PIL import Image

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO), str(REPO / "tests")]

from browser import Browser  # noqa: E402

from bench import common, html_report  # noqa: E402

HEIGHT, GAP = 1150, 24


def shot(browser: Browser, page: Path, width: int, dark: bool, place: str, out: Path) -> Image.Image:
    """What is seen of `page` from the section `place` on, in a window of `width` pixels."""
    browser.open(page.as_uri(), width=width, height=HEIGHT, dark=dark)
    browser.evaluate(f"document.getElementById('{place}').scrollIntoView()")
    browser.screenshot(out)
    return Image.open(out)


def main() -> None:
    parser = argparse.ArgumentParser(prog="screenshot_report", description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    parser.add_argument("--out", type=Path, default=REPO / "docs" / "images" / "report.png")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        html_report.build(args.results, folder / "report.html")
        browser = Browser(folder / "browser")
        try:
            page = folder / "report.html"
            wide = shot(browser, page, 900, False, "memory-cpu-json", folder / "wide.png")
            phone = shot(browser, page, 375, True, "step-cpu-json", folder / "phone.png")
        finally:
            browser.close()
        both = Image.new("RGB", (wide.width + GAP + phone.width, HEIGHT), "white")
        both.paste(wide, (0, 0))
        both.paste(phone, (wide.width + GAP, 0))
        both.save(args.out, optimize=True)
    print(args.out)


if __name__ == "__main__":
    main()
