"""The live page in a real browser: it samples, follows what one turns, and asks for nothing outside."""

import io
import json
import re
import shutil

import numpy as np
import pytest
from javascript import INSTALL
from PIL import Image
from tiny import ROOT

import ex2_main

playwright = pytest.importorskip("playwright.sync_api", reason=f"{INSTALL}: playwright drives the browser")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed here")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        yield started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture(scope="module")
def address(trained, tmp_path_factory):
    """The page in a folder with a space and letters of other languages in its name."""
    folder = tmp_path_factory.mktemp("pages") / "with space, ü"
    assert ex2_main.main(["export", "--checkpoint", str(trained), "--out", str(folder)]) == 0
    return (folder / "live.html").as_uri()


class Driver:
    """A page that is open, and what a test sees of it."""

    def __init__(self, browser, address, width=1100, script=None):
        self.page = browser.new_page(viewport={"width": width, "height": 900}, accept_downloads=True)
        self.said, self.asked = [], []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        if script:
            self.page.add_init_script(script)
        self.page.goto(address)
        self.settle()

    def settle(self):
        """Waits until the last run has ended."""
        self.page.wait_for_selector("body[data-state=idle]", timeout=30_000)

    def set(self, selector, value):
        """Turns a slider, a choice or a number."""
        script = """(element, value) => {
            element.value = value;
            element.dispatchEvent(new Event("input", {bubbles: true}));
        }"""
        self.page.locator(selector).evaluate(script, str(value))
        self.settle()

    def click(self, text):
        self.page.get_by_text(text, exact=True).first.click()
        self.settle()

    def pictures(self):
        """Every picture of the stage as an array (height, width, 4)."""
        read = """canvases => canvases.map(c => [c.height, c.width,
            Array.from(c.getContext("2d").getImageData(0, 0, c.width, c.height).data)])"""
        found = self.page.locator("#rows canvas").evaluate_all(read)
        return [np.array(data, np.uint8).reshape(height, width, 4) for height, width, data in found]

    def numbers(self):
        """Eq. 8 at the chosen pixel: its three factors, and x_t, eps, the x_0 estimate, the mean, x_{t-1} by colour."""
        texts = [self.page.inner_text(f"#{name}") for name in ("recip", "noise-factor", "sigma")]
        table = self.page.locator("#numbers td").all_inner_texts()
        minus = [float(text.replace("−", "-")) for text in (*texts, *table)]
        return minus[:3], np.array(minus[3:]).reshape(3, 5)


@pytest.fixture
def driver(browser, address):
    driver = Driver(browser, address)
    yield driver
    driver.page.close()
    assert driver.said == [] and all(re.match("file:|blob:", url) for url in driver.asked)


@pytest.mark.parametrize("width", [420, 1100])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_samples_at_once_and_asks_for_nothing_outside(browser, address, width, scheme):
    driver = Driver(browser, address, width)
    driver.page.emulate_media(color_scheme=scheme)
    pictures = driver.pictures()
    assert len(pictures) == 3 and all(picture.shape == (8, 8, 4) and picture.std() > 1 for picture in pictures)
    assert driver.page.evaluate("document.documentElement.scrollWidth") == width
    assert "WebAssembly SIMD" in driver.page.inner_text("#status")
    assert driver.said == [] and {url.split(":")[0] for url in driver.asked} == {"file", "blob"}
    driver.page.close()


def test_nothing_can_be_asked_from_outside(driver):
    blocked = driver.page.evaluate("fetch('https://example.org').then(() => false, () => true)")
    assert blocked and any("Content Security Policy" in said for said in driver.said)
    driver.said.clear()


def test_the_picture_follows_the_sliders_and_comes_back(driver):
    first = driver.pictures()[0]
    for selector, value, before in (("#scale", 5, 1), ("#steps", 0, 1), ("#seed", 3, 0), ("#eta", 1, 0)):
        driver.set(selector, value)
        assert not np.array_equal(driver.pictures()[0], first), selector
        driver.set(selector, before)
        assert np.array_equal(driver.pictures()[0], first), selector
    driver.page.select_option("#sampler", "ddpm")
    driver.settle()
    assert not np.array_equal(driver.pictures()[0], first) and driver.page.is_disabled("#eta")


def test_classes_all_of_them_and_none(driver):
    circle = driver.pictures()[0]
    driver.click("moon")
    assert not np.array_equal(driver.pictures()[0], circle)
    driver.click("all classes")
    assert driver.pictures()[0].shape == (2 * 9 - 1, 5 * 9 - 1, 4)
    assert np.array_equal(driver.pictures()[0][:8, :8], circle)
    driver.click("no class")
    free = driver.pictures()[0]
    driver.click("circle")
    driver.set("#scale", -1)
    assert np.array_equal(driver.pictures()[0], free)


def test_two_guidance_scales_start_from_the_same_noise(driver):
    driver.page.check("#compare")
    driver.settle()
    driver.set("#scale2", 4)
    one, two = driver.pictures()[0], driver.pictures()[3]
    assert not np.array_equal(one, two)
    driver.set("#time", 0)
    assert np.array_equal(driver.pictures()[0], driver.pictures()[3])
    assert driver.page.locator("#rows .row > p").all_inner_texts() == ["w = 1, ddim", "w = 4, ddim"]


def test_the_timeline_goes_back_to_every_step(driver):
    seen = []
    for step in range(4):
        driver.set("#time", step)
        seen.append((driver.page.inner_text("#when"), driver.pictures()[0].tobytes()))
    assert len(set(seen)) == 4
    assert seen[0][0].startswith("t = 30 of 30") and seen[3][0] == "t = 0: the sample, after 3 steps"
    driver.page.click("#play")
    assert driver.page.inner_text("#play") == "Pause"
    driver.page.get_by_text("t = 0: the sample, after 3 steps").wait_for()
    assert driver.pictures()[0].tobytes() == seen[3][1]


def test_the_numbers_at_a_pixel_are_eq_8(driver):
    driver.page.select_option("#sampler", "ddpm")
    driver.settle()
    driver.set("#time", 1)
    driver.page.locator("#rows canvas").first.hover(position={"x": 5, "y": 5})
    assert "Pixel (0, 0)" in driver.page.inner_text("#pixel-note")
    (recip, factor, sigma), table = driver.numbers()
    x, eps, x_zero, mean, x_next = table.T
    assert np.allclose(recip * (x - factor * eps), mean, atol=3e-3) and sigma > 0
    assert abs(x_zero).max() <= 1 and not np.allclose(mean, x_next, atol=1e-2)
    driver.page.locator("#rows canvas").first.press("ArrowRight")
    assert "Pixel (1, 0)" in driver.page.inner_text("#pixel-note")
    driver.set("#time", 2)  # the last step adds no noise
    _, table = driver.numbers()
    assert np.allclose(table[:, 3], table[:, 4], atol=2e-3)


def test_a_painted_or_dropped_picture_is_noised_and_denoised(driver, tmp_path):
    driver.click("from a picture")
    white = driver.pictures()[0]
    assert white[..., :3].mean() > 128
    box = driver.page.locator("#easel").bounding_box()
    driver.page.mouse.move(box["x"] + 20, box["y"] + 20)
    driver.page.mouse.down()
    driver.page.mouse.move(box["x"] + 100, box["y"] + 100, steps=4)
    driver.page.mouse.up()
    driver.settle()
    assert not np.array_equal(driver.pictures()[0], white)
    Image.new("RGB", (30, 20), "blue").save(tmp_path / "blue.png")
    driver.page.set_input_files("#file", tmp_path / "blue.png")
    driver.page.wait_for_timeout(100)
    driver.settle()
    driver.set("#fraction", 0.1)
    assert "Eq. 4: xₜ = 0.9" in driver.page.inner_text("#forward")
    assert abs(driver.pictures()[0][..., :3].mean((0, 1)) - (0, 0, 255)).max() < 60
    driver.set("#fraction", 1)
    assert abs(driver.pictures()[0][..., :3].mean((0, 1)) - (0, 0, 255)).max() > 60


def test_a_file_that_is_no_picture_is_said(driver, tmp_path):
    driver.click("from a picture")
    (tmp_path / "notes.txt").write_text("no picture")
    driver.page.set_input_files("#file", tmp_path / "notes.txt")
    driver.page.get_by_text("notes.txt can't be read as a picture").wait_for()


def test_pictures_and_trajectories_are_saved(driver):
    found = {}
    for button in ("#save-png", "#save-apng"):
        with driver.page.expect_download() as download:
            driver.page.click(button)
        found[button] = Image.open(io.BytesIO(download.value.path().read_bytes()))
        assert download.value.suggested_filename == "cond-circle-w=1-seed=0.png"
    image = np.asarray(found["#save-png"])
    assert image.shape == (256, 256, 4)
    assert np.array_equal(image[16::32, 16::32], driver.pictures()[0])
    animation = found["#save-apng"]
    assert (animation.n_frames, animation.width, animation.info["loop"]) == (4, 2 * 256 + 32, 0)
    animation.seek(3)
    assert np.array_equal(np.asarray(animation)[16:256:32, 16:256:32], driver.pictures()[0])


def test_without_simd_it_says_so_and_computes_the_same(browser, address, driver):
    plain = Driver(browser, address, script="WebAssembly.validate = () => false")
    assert "This browser has no WebAssembly SIMD" in plain.page.inner_text("#status")
    assert abs(plain.pictures()[0].astype(int) - driver.pictures()[0]).max() <= 1
    plain.page.close()


def test_every_control_has_a_name_and_the_keyboard_reaches_it(driver):
    driver.click("from a picture")
    driver.page.check("#compare")
    driver.settle()
    unnamed = driver.page.locator("input, select, button, canvas").evaluate_all("""all => all.filter(e =>
        !(e.labels?.length || e.getAttribute("aria-label") || e.textContent.trim())).map(e => e.id)""")
    assert unnamed == []
    before = driver.page.locator("#easel").evaluate("canvas => canvas.toDataURL()")
    driver.page.locator("#easel").press("ArrowDown")
    driver.page.locator("#easel").press(" ")
    driver.settle()
    assert driver.page.locator("#easel").evaluate("canvas => canvas.toDataURL()") != before
    driver.page.locator("#scale").press("ArrowRight")
    driver.settle()
    assert driver.page.inner_text("#scale-value") == "1.25"


def test_the_page_of_the_showcase_samples_and_is_small_enough_to_be_sent(browser):
    path = ROOT / "results" / "showcase" / "live.html"
    assert path.stat().st_size < 4e6
    driver = Driver(browser, path.as_uri(), 420)
    steps = json.loads((path.parent / "quick" / "config.json").read_text())["sample_steps"]
    assert driver.page.inner_text("#when") == f"t = 0: the sample, after {steps} steps"
    assert driver.pictures()[0].shape == (16, 16, 4) and driver.said == []
    driver.page.close()
