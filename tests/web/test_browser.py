"""The page in a browser: what a visitor does, sees, and takes away."""

import io
import json
import os
import re
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright
from serving import Site, serving, until
from small_models import small_pipeline

from igpt_fast import Pipeline

expect.set_options(timeout=30_000)  # other tests may run beside these
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.xdist_group("web"),
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here; make test-web installs it"),
]


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with serving(Pipeline.from_pretrained(device="cpu")) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.getuid() == 0 else []  # which root cannot have
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield found
        found.close()


def opened(browser: Browser, site: Site, **options: Any) -> Page:
    """The page, ready; what it complains of and asks for stands in ``page.said`` and ``page.asked``."""
    page = browser.new_context(**options).new_page()
    page.set_default_timeout(30_000)
    page.said, page.asked = [], []  # type: ignore[attr-defined]
    page.on("console", lambda message: page.said.append(message.text))  # type: ignore[attr-defined]
    page.on("pageerror", lambda error: page.said.append(str(error)))  # type: ignore[attr-defined]
    page.on("request", lambda request: page.asked.append(request.url))  # type: ignore[attr-defined]
    page.goto(f"http://127.0.0.1:{site.port}/")
    page.wait_for_selector("body[data-ready]")
    return page


@pytest.fixture
def visit(browser: Browser, site: Site) -> Iterator[Page]:
    page = opened(browser, site)
    yield page
    own = f"http://127.0.0.1:{site.port}/"
    assert page.said == []  # type: ignore[attr-defined]
    assert [url for url in page.asked if not url.startswith((own, "blob:"))] == []  # type: ignore[attr-defined]
    page.context.close()
    assert site.idle()


def state(page: Page, name: str) -> list[int]:
    """``tokens`` or ``known`` of the page."""
    return page.evaluate(f"[...{name}]")


def finished(page: Page) -> None:
    expect(page.locator("#status")).to_contain_text("engine")


def sheet(page: Page, row: float, column: float) -> tuple[float, float]:
    """Where a pixel of the picture is on the screen."""
    box = page.locator("#sheet").bounding_box()
    assert box
    return box["x"] + (column + 0.5) / 16 * box["width"], box["y"] + (row + 0.5) / 16 * box["height"]


def stroke(page: Page, *places: tuple[int, int]) -> None:
    page.mouse.move(*sheet(page, *places[0]))
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*sheet(page, *place))
    page.mouse.up()


def shown(page: Page, index: int) -> np.ndarray:
    """(H, W, 4) of what the canvas of a result shows."""
    return pixels(page, f"document.querySelectorAll('#shots canvas')[{index}]")


def pixels(page: Page, canvas: str) -> np.ndarray:
    code = f"(c => [c.height, c.width, ...c.getContext('2d').getImageData(0, 0, c.width, c.height).data])({canvas})"
    height, width, *values = page.evaluate(code)
    return np.array(values, np.uint8).reshape(height, width, 4)


def test_a_stroke_is_drawn_again_and_the_rest_is_kept(visit: Page) -> None:
    visit.click("#show-all")
    expect(visit.locator("#go")).to_be_disabled()
    before = state(visit, "tokens")
    visit.locator("#size").fill("1")
    stroke(visit, (6, 3), (6, 12))  # the pointer jumps; the stroke does not
    known = np.array(state(visit, "known")).reshape(16, 16)
    hidden = np.zeros((16, 16), bool)
    hidden[6, 3:13] = True
    np.testing.assert_array_equal(known == 0, hidden)
    expect(visit.locator("#kept")).to_have_text("246 of 256 pixels are kept")
    visit.locator("#n").fill("3")
    visit.click("#go")
    finished(visit)
    assert state(visit, "tokens") == before
    palette = np.array(visit.evaluate("model.palette"))
    for i in range(3):
        drawn = shown(visit, i)
        assert (drawn[..., 3] == 255).all()
        np.testing.assert_array_equal(drawn[~hidden][:, :3], palette[before].reshape(16, 16, 3)[~hidden])
    assert "--mask mask.png -n 3 --seed" in visit.inner_text("#command")
    visit.locator("figure button").first.click()  # takes it as the picture
    np.testing.assert_array_equal(palette[state(visit, "tokens")].reshape(16, 16, 3), shown(visit, 0)[..., :3])
    visit.click("#undo")
    assert state(visit, "tokens") == before


@pytest.mark.clock
def test_rows_arrive_one_by_one_and_soon(visit: Page) -> None:
    """The first drawn one 0.3 s after the click, four completions of half a picture after 1.5 s; once in ten."""
    code = """new Promise(done => {
        const times = [], old = grow, last = finish, start = performance.now();
        grow = (shots, line) => { times.push([line.row, performance.now() - start]); old(shots, line); };
        finish = (...all) => { grow = old; finish = last; last(...all); done(times); };
        $("go").click();
    })"""
    found = []
    for _ in range(10):
        rows, times = zip(*visit.evaluate(code), strict=True)
        assert rows == tuple(range(16))
        assert len({round(when) for when in times[8:]}) > 3
        found.append((round(times[8]), round(times[15])))
        if times[8] < 300 and times[15] < 1500:
            return
    pytest.fail(f"milliseconds until the first drawn row, and the last: {found}")


def test_stop_frees_the_model(visit: Page, site: Site) -> None:
    visit.locator("#n").fill("16")
    visit.evaluate("known.fill(0); known[255] = 1; show()")
    visit.locator("#candidates").fill("64")  # a minute
    visit.click("#go")
    expect(visit.locator("#status")).to_have_text("Drawing")
    expect(visit.locator("#go")).to_be_disabled()
    visit.click("#stop")
    expect(visit.locator("#status")).to_have_text("Stopped")
    assert site.idle()
    expect(visit.locator("#go")).to_be_enabled()
    visit.keyboard.press("Enter")  # by keyboard too: the focus goes to what can be pressed next
    expect(visit.locator("#status")).to_have_text("Drawing")
    expect(visit.locator("#stop")).to_be_focused()
    visit.keyboard.press("Enter")
    expect(visit.locator("#status")).to_have_text("Stopped")
    expect(visit.locator("#go")).to_be_focused()
    assert site.idle()


def test_leaving_the_page_frees_the_model_for_who_waits(browser: Browser, visit: Page, site: Site) -> None:
    other = opened(browser, site)
    other.evaluate("known.fill(0); known[255] = 1; show()")
    other.locator("#n").fill("16")
    other.locator("#candidates").fill("64")
    other.click("#go")
    expect(other.locator("#status")).to_have_text("Drawing")
    visit.click("#go")
    expect(visit.locator("#status")).to_have_text("Waiting: 1 before you")
    other.goto("about:blank")
    finished(visit)
    other.context.close()


def test_surprise_under_the_pointer(visit: Page, site: Site) -> None:
    visit.click("#ask")
    told = visit.locator("#told")
    expect(told).to_contain_text("a pixel on average")
    nats = site.lines("/surprise", {"tokens": state(visit, "tokens")})[-1]["nats"]
    assert visit.inner_text("#told b") == f"{sum(nats) / 256:.2f} nats"
    box = visit.locator("#map").bounding_box()
    assert box
    visit.mouse.move(box["x"] + 5.5 / 16 * box["width"], box["y"] + 9.5 / 16 * box["height"])
    expect(told).to_contain_text(f"{nats[9 * 16 + 5]:.2f} nats")
    expect(told).to_contain_text("row 10, column 6")
    visit.locator("#map").focus()
    visit.keyboard.press("ArrowRight")
    expect(told).to_contain_text("row 10, column 7")
    heat = pixels(visit, "$('map').firstElementChild").astype(int)[..., :3].sum(axis=2).reshape(256)
    assert heat[int(np.argmax(nats))] > heat[int(np.argmin(nats))] + 200
    assert visit.inner_text("#scale").split("\n") == ["> 4.9", "2.4", "0 nats"]


def test_downloads(visit: Page) -> None:
    stroke(visit, (3, 3), (3, 9))  # a mask
    visit.click("#go")
    finished(visit)
    kinds = {}
    for link in visit.locator("#files a").all():
        with visit.expect_download() as event:
            link.click()
        with open(event.value.path(), "rb") as file:
            kinds[event.value.suggested_filename] = file.read()
    assert list(kinds) == ["completions.png", "completions.gif", "completions.npz", "picture.png", "mask.png"]
    for name, content in kinds.items():
        if not name.endswith("npz"):
            Image.open(io.BytesIO(content)).load()
    with np.load(io.BytesIO(kinds["completions.npz"])) as arrays:
        assert arrays["tokens"].shape == (4, 16, 16)
    mask = np.asarray(Image.open(io.BytesIO(kinds["mask.png"])).convert("L"))
    np.testing.assert_array_equal(mask.reshape(-1) // 255, state(visit, "known"))


def test_drawing_from_nothing_with_the_settings(visit: Page) -> None:
    visit.locator("#temperature").fill("0.8")
    visit.locator("#top-k").fill("40")
    visit.locator("#top-p").fill("0.9")
    visit.locator("#n").fill("2")
    visit.locator("#seed").fill("12")
    before = state(visit, "known")
    with visit.expect_request("**/complete") as asked:
        visit.click("#dream")
    question = json.loads(asked.value.post_data or "")
    settings = {"n": 2, "seed": 12, "temperature": 0.8, "top_k": 40, "top_p": 0.9, "candidates": 1}
    assert {name: question[name] for name in settings} == settings
    finished(visit)
    assert visit.inner_text("#command") == "igpt sample -n 2 --seed 12 --temperature 0.8 --top-k 40 --top-p 0.9"
    assert state(visit, "known") == before
    visit.locator("#seed").fill("12345678901234567890")
    visit.click("#dream")
    expect(visit.locator("#status")).to_contain_text("seed 12345678901234567890, engine")
    visit.locator("#seed").fill("-5")
    visit.click("#go")
    expect(visit.locator("#status.bad")).to_have_text(re.compile("seed is '-5'; want an integer"))
    assert visit.said.pop().startswith("Failed to load resource")  # type: ignore[attr-defined]


def dragged(page: Page, event: str, name: str, kind: str, content: bytes) -> None:
    """A file that is dropped on the page, or pasted."""
    page.evaluate(
        """([event, name, kind, content]) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(content)], name, {type: kind}));
            const options = {bubbles: true, cancelable: true, dataTransfer: data, clipboardData: data};
            const kinds = {drop: DragEvent, paste: ClipboardEvent};
            document.body.dispatchEvent(new kinds[event](event, options));
        }""",
        [event, name, kind, list(content)],
    )


def test_pictures_from_files_and_examples(visit: Page, site: Site) -> None:
    with io.BytesIO() as file:
        Image.linear_gradient("L").resize((64, 48)).convert("RGB").save(file, "PNG")
        content = file.getvalue()
    want = site.json("/tokens", content)["tokens"]
    ways = {
        "open": lambda: visit.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": content}),
        "drop": lambda: dragged(visit, "drop", "a.png", "image/png", content),
        "paste": lambda: dragged(visit, "paste", "a.png", "image/png", content),
    }
    for way in ways.values():
        visit.locator("#examples button").nth(1).click()
        expect(visit.locator("#status")).to_have_text("smiling face with heart-shaped eyes")
        assert state(visit, "tokens") == site.json(f"/example/{site.json('/model')['shown'][1]}")["tokens"]
        way()
        assert until(lambda: state(visit, "tokens") == want)
    expect(visit.locator("#kept")).to_have_text("The upper 8 of 16 rows are kept")
    with visit.expect_response("**/example/*"):
        visit.click("#random")
    assert until(lambda: state(visit, "tokens") != want)
    dragged(visit, "drop", "notes.txt", "text/plain", b"no picture")
    expect(visit.locator("#status.bad")).to_have_text(re.compile(r"notes\.txt: not a readable image"))
    visit.evaluate("open({size: 1e9, name: 'large.png'})")
    expect(visit.locator("#status.bad")).to_have_text("large.png is larger than 16 MiB")
    assert visit.said.pop().startswith("Failed to load resource")  # type: ignore[attr-defined]


def test_painting_by_keyboard(visit: Page) -> None:
    visit.click("#blank")
    visit.locator("#size").fill("1")
    visit.locator("#sheet").focus()
    for key in (
        "ArrowDown",
        "ArrowRight",
        "p",
        " ",
        "Shift+ArrowRight",
        "ArrowDown",
        "h",
        "Enter",
        "]",
        "s",
        "ArrowUp",
    ):
        visit.keyboard.press(key)
    painted = np.array(state(visit, "tokens")).reshape(16, 16)
    colour = visit.evaluate("colour()")
    assert np.argwhere(painted == colour).tolist() == [[1, 1], [1, 2]]
    assert np.argwhere(np.array(state(visit, "known")).reshape(16, 16) == 0).tolist() == [[2, 2]]
    assert visit.evaluate("tool()") == "show"
    assert visit.locator("#size").input_value() == "2"
    expect(visit.locator("#place")).to_contain_text("row 2, column 3, kept, #")
    for _ in range(3):
        visit.keyboard.press("Control+z")
    assert (np.array(state(visit, "tokens")) == painted[0, 0]).all()


def test_rows_are_kept_by_the_slider(visit: Page) -> None:
    visit.locator("#keep").fill("5")
    assert state(visit, "known") == [1] * 80 + [0] * 176
    expect(visit.locator("#kept")).to_have_text("The upper 5 of 16 rows are kept")
    expect(visit.locator("#candidates")).to_be_disabled()
    visit.click("#invert")
    expect(visit.locator("#candidates")).to_be_enabled()
    visit.evaluate("known.fill(1, 0, 100).fill(0, 100); show()")
    expect(visit.locator("#candidates")).to_be_disabled()  # nothing that is kept follows a drawn pixel
    before = state(visit, "known")
    visit.locator("#keep").focus()
    visit.keyboard.press("PageUp")
    assert state(visit, "known") != before
    visit.keyboard.press("Control+z")
    assert state(visit, "known") == before
    box, track = visit.locator("#sheet").bounding_box(), visit.locator("#keep").bounding_box()
    assert box
    assert track
    assert abs((track["y"] + track["height"] / 2) - (box["y"] + box["height"] / 2)) < 1  # they stand side by side


def test_everything_has_a_name(visit: Page) -> None:
    code = """[...document.querySelectorAll("button, input, select, canvas, [role=application]")].filter(node =>
        !node.closest("[hidden]") && node.tagName !== "CANVAS" && !node.labels?.length && !node.ariaLabel &&
        !node.textContent.trim()).map(node => node.outerHTML)"""
    assert visit.evaluate(code) == []
    assert visit.evaluate("document.documentElement.lang") == "en"


INSIDE = """[...document.querySelectorAll("#actions button")].flatMap(node => {
    const box = node.getBoundingClientRect();
    return [box.left, box.right];
})"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow_screens_and_both_schemes(browser: Browser, site: Site, scheme: Any) -> None:
    page = opened(browser, site, viewport={"width": 360, "height": 740}, color_scheme=scheme)
    page.click("#go")
    finished(page)
    page.click("#ask")
    expect(page.locator("#told")).to_contain_text("a pixel on average")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    bar = page.locator("#actions")
    for running in (False, True):
        page.evaluate(f"busy({json.dumps(running)})")
        box = bar.bounding_box()
        assert box
        assert box["height"] < 70  # one line, so that it hides little
        assert all(0 <= edge <= 360 for edge in page.evaluate(INSIDE))
    page.evaluate("busy(false)")
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground))) > 384) == (scheme == "light")
    assert page.said == []  # type: ignore[attr-defined]
    page.context.close()


def test_classes_and_guidance(browser: Browser) -> None:
    pipeline = small_pipeline(5, 4, 9, classes=3)
    pipeline.model.float()
    pipeline.model.config.id2label = {0: "cat", 1: "dog", 2: "<img src=x>"}
    with serving(pipeline) as small:
        page = opened(browser, small)
        expect(page.locator("#guidance")).to_be_disabled()
        page.select_option("#label", label="<img src=x>")
        page.locator("#guidance").fill("2")
        page.click("#go")
        finished(page)
        assert page.inner_text("#command").endswith("--cfg-scale 2.0 --label 2")
        assert page.said == []  # type: ignore[attr-defined]
        page.context.close()
