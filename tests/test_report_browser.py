"""The page of a report in a real Chromium: it loads nothing, runs nothing but its own, and can be read anywhere."""

import os
import shutil

import pytest
from documents import hostile_page, sample_document, sample_page

REQUIRED = os.environ.get("NPTI_REQUIRE_BROWSER", "") not in ("", "0")  # as .ci/run has it: no browser is a failure
if REQUIRED:
    import playwright.sync_api as playwright
else:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync"]  # fmt: skip
PHONE = {"width": 360, "height": 740}

MISSING = f"no Chromium: set CHROMIUM, or install one of {', '.join(NAMES)}"

pytestmark = pytest.mark.skipif(CHROMIUM is None and not REQUIRED, reason=MISSING)

# Every text that is seen: its colour, the colour behind it, its size and what it is. Colours as [r, g, b, a] of 0 to 1.
TEXTS = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data].map((value) => value / 255);
  };
  const behind = (one) => {
    for (; one; one = one.parentElement) {
      const colour = rgba(getComputedStyle(one).backgroundColor);
      if (colour[3] === 1) return colour;
    }
    return [1, 1, 1, 1];
  };
  const found = [];
  for (const one of document.body.querySelectorAll("*")) {
    const text = [...one.childNodes].filter((node) => node.nodeType === 3).map((node) => node.data).join("").trim();
    if (!text || !one.checkVisibility() || ["SCRIPT", "OPTION"].includes(one.tagName)) continue;
    const style = getComputedStyle(one), svg = one.namespaceURI.endsWith("svg");
    found.push([rgba(svg ? style.fill : style.color), behind(one), text.slice(0, 60)]);
  }
  return found;
}"""


def luminance(colour):
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in colour[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.fail(f"NPTI_REQUIRE_BROWSER is set, and there is {MISSING}", pytrace=False)
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield found
        found.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    pages = {"sample": sample_page(), "hostile": hostile_page()}
    for name, text in pages.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in pages}


@pytest.fixture
def visit(browser, files):
    """visit(name, **context) -> the loaded page; in the end there must be no complaint, no request but for itself."""
    contexts, heard, asked = [], [], []

    def open_page(name="sample", **options):
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.on("console", lambda message: heard.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: heard.append(str(error)))
        page.on("dialog", lambda dialog: heard.append(dialog.message) or dialog.dismiss())
        page.on("request", lambda request: asked.append(request.url))
        page.goto(files[name].as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert heard == []
    assert {url for url in asked if url != "data:,"} <= {path.as_uri() for path in files.values()}


def current(page):
    return page.locator(".question:visible")


def test_pages_turn_by_button_and_by_key(visit):
    page = visit()
    answers = sample_document().answers
    place = page.locator("#place")
    assert current(page).count() == 1
    assert answers[0].question in current(page).inner_text()
    assert place.inner_text() == "1 of 90"
    page.get_by_role("button", name="Next question").click()
    assert answers[1].question in current(page).inner_text()
    page.get_by_role("button", name="Previous question").click()
    page.keyboard.press("ArrowLeft")
    assert place.inner_text() == "90 of 90"
    assert answers[89].question in current(page).inner_text()
    page.keyboard.press("ArrowRight")
    assert place.inner_text() == "1 of 90"
    page.locator("#left").focus()  # where arrows choose
    page.keyboard.press("ArrowRight")
    assert place.inner_text() == "1 of 90"


def test_two_answers_side_by_side_of_ones_choice(visit):
    page = visit(viewport={"width": 1200, "height": 900})
    seen = current(page).locator(".reply:visible")
    assert seen.first.locator("h4").inner_text().startswith("Unsteered")
    left, right = (one.bounding_box() for one in seen.all())
    assert left["y"] == right["y"]
    assert left["x"] < right["x"]
    page.locator("#left").select_option(label="LoRA on persona answers")
    assert (
        sample_document().answers[0].answers["lora"].split("\n")[0] in seen.last.inner_text() + seen.first.inner_text()
    )
    page.locator("#right").select_option(label="LoRA on persona answers")
    assert seen.count() == 1
    page.locator("#facet").select_option(label="anger")
    assert page.locator("#place").inner_text() == "1 of 15"
    assert "anger" in current(page).inner_text()


def test_a_phone_scrolls_one_way(visit):
    for name in ("sample", "hostile"):
        page = visit(name, viewport=PHONE, device_scale_factor=2, is_mobile=True, has_touch=True)
        for details in page.locator("details.fold").all():
            details.evaluate("one => { one.open = true; }")
        assert page.evaluate("document.documentElement.scrollWidth <= 360 && innerWidth === 360")
        assert page.locator(".phone svg").first.is_visible()
        assert not page.locator(".desk svg").first.is_visible()
        scrolls = page.locator(".scroll").evaluate_all("all => all.some((one) => one.scrollWidth > one.clientWidth)")
        assert scrolls  # wide tables do so in their own box
    page = visit(viewport=PHONE)
    # A pixel of a figure is at least 0.9 of what it was drawn for, so that its 11 pixels high letters can be read.
    sizes = page.locator(".phone svg").evaluate_all(
        "all => all.map((one) => one.getBoundingClientRect().width / one.viewBox.baseVal.width / (96 / 72))"
    )
    assert min(sizes) > 0.9


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, {"width": 1200, "height": 900}])
def test_every_text_stands_out(visit, scheme, size):
    page = visit(viewport=size, color_scheme=scheme)
    for details in page.locator("details.fold").all():
        details.evaluate("one => { one.open = true; }")
    found = page.evaluate(TEXTS)
    assert len(found) > 300
    assert {text for *_, text in found} >= {
        "Effect",
        "neuroticism−",
        "Steered (this file)",
        "openness",
        "persona prompt",
    }
    for colour, behind, text in found:
        assert contrast(colour, behind) >= 4.5, text
        assert (luminance(behind) < 0.1) == (scheme == "dark"), text


def test_without_javascript_everything_is_there(visit):
    page = visit(java_script_enabled=False)
    assert not page.locator(".pager").is_visible()
    assert page.locator(".question").count() == page.locator(".question:visible").count() == 90
    last = page.locator(".question").last
    assert not last.locator(".said").first.is_visible()
    last.locator("summary").click()
    assert last.locator(".said:visible").count() == 10


def test_nothing_of_a_file_runs(visit):
    for options in ({}, {"viewport": PHONE, "color_scheme": "dark"}):
        page = visit("hostile", **options)
        for _ in range(8):
            page.keyboard.press("ArrowRight")
        page.wait_for_timeout(100)
        assert page.title().startswith("</script><script>document.title='owned'</script>")
        assert page.locator("img, iframe, object, embed, base").count() == 0
        assert page.locator("script").count() == 1
        assert page.locator(".said", has_text="onerror").count() > 0


def test_the_policy_refuses_what_would_come_through(browser, files, tmp_path):
    """Were a value ever not escaped, it would still do nothing."""
    text = files["sample"].read_text(encoding="utf-8")
    injected = "<script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\"></main>"
    (tmp_path / "injected.html").write_text(text.replace("</main>", injected, 1), encoding="utf-8")
    page = browser.new_page()
    refused = []
    page.on("console", lambda message: refused.append(message.text))
    page.goto((tmp_path / "injected.html").as_uri())
    page.wait_for_timeout(200)
    assert page.locator("img").count() == 1
    assert page.title() == "neuroticism−: evaluation"
    assert any("Content Security Policy" in text for text in refused)
    assert page.locator("#place").inner_text() == "1 of 90"  # ours runs
    page.close()


def test_focus_can_be_seen_and_the_verdict_skipped_to(visit):
    page = visit()
    page.keyboard.press("Tab")
    focused = page.evaluate("[document.activeElement.className, getComputedStyle(document.activeElement).outlineStyle]")
    assert focused == ["skip", "solid"]
    page.keyboard.press("Enter")
    assert page.evaluate("location.hash") == "#verdict"
