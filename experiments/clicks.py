"""How long the page of demo.py takes from a click to another picture, in headless Chromium.

    python demo.py                                              # and then, beside it:
    python experiments/clicks.py                                # 20 swaps, in milliseconds
    python experiments/clicks.py --picture assets/demo.png      # and a picture of the page

Needs playwright (requirements-extra.txt) and Chromium (apt-get install chromium).
"""

import argparse
import io
import shutil
import statistics
import sys
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from support.files import InputError, replacing  # noqa: E402
from support.run import one_sentence_errors  # noqa: E402

# Click the element that a selector names and wait until the first picture of the tokens is another.
SWAP = """async selector => {
    const source = () => document.querySelector('#tokens .picture img').src;
    const before = source(), start = performance.now();
    document.querySelector(selector).click();
    while (source() === before) await new Promise(requestAnimationFrame);
    return performance.now() - start;
}"""


@contextmanager
def open_in_browser(url, **options):
    """A running page in headless Chromium, and a list of all addresses that it asks for."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise InputError("a browser is driven by playwright: pip install -r requirements-extra.txt") from None
    chromium = shutil.which("chromium")
    if chromium is None:
        raise InputError("there is no browser: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page, asked = browser.new_page(**options), []
        page.set_default_timeout(120_000)
        page.on("request", lambda request: asked.append(request.url))
        page.goto(url)
        page.wait_for_selector("#tokens [data-cell='0']")
        yield page, asked
        browser.close()


def swap_near(page, rank):
    """Swap the token that is looked at for the code nearest to it, or the second, ... -> milliseconds until seen."""
    return page.evaluate(SWAP, f"#code .tiles:last-child button:nth-child({rank})")


def look_at(page, place):
    """Click a token."""
    page.click(f"#tokens [data-cell='{place}']")
    page.wait_for_selector(f"#tokens [data-cell='{place}'].marked")


def draw(page, path):
    """Write a picture of the page, on which one place has been given the token of another."""
    page.click("#back")
    page.wait_for_selector("text=0 swapped")
    look_at(page, 11)
    page.fill("#number input", page.inner_text("#tokens [data-cell='29']"))
    page.press("#number input", "Enter")
    page.wait_for_selector("text=1 swapped")
    page.mouse.move(0, 0)
    with replacing(path) as part:  # 256 colours take a third of the room
        Image.open(io.BytesIO(page.screenshot())).convert("RGB").quantize(256).save(part, "PNG", optimize=True)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:7860", help="of the page")
    parser.add_argument("--picture", type=Path, help="PNG of the page, to be written")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    with one_sentence_errors(), open_in_browser(args.url, viewport={"width": 1280, "height": 940}) as (page, _):
        look_at(page, 20)
        times = []
        for _ in range(20):
            times.append(swap_near(page, 8))
            page.wait_for_timeout(300)
        print(f"from click to picture: median {statistics.median(times):.0f} ms, longest {max(times):.0f} ms")
        if args.picture:
            draw(page, args.picture)
            print(args.picture)


if __name__ == "__main__":
    main()
