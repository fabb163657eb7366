"""The page at `/` in Chromium, with a real server and a real worker with the demo model."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import requests
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright
from support.http_server import serve
from support.processes import clean_environ, free_port, wait_until
from zlora import config
from zlora.schema import MAX_SEED
from zlora.server.tenants import KeyFile, Tenant, new_key, write

SMALL: Final = {"num_inference_steps": 4, "seed": 7}
MARKUP: Final = (
    "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
)
# Pixels of the window's width, and the colours that the system prefers.
SCREENS: Final = ((1280, "light"), (360, "dark"))

Open = Callable[..., Page]

expect.set_options(timeout=20_000)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def url(home: Path) -> Iterator[str]:
    """Address of the page that `zlora up --serve` prints."""
    port = free_port()
    command = [sys.executable, "-m", "zlora", "up", "--serve", f"--serve-port={port}"]
    screen = home / "screen"
    with screen.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=clean_environ({"ZLORA_HOME": str(home), "ZLORA_MODEL": "demo"}),
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        ready = re.compile(rf"^ready after .*open (http://127\.0\.0\.1:{port}/)", re.MULTILINE)

        def look() -> "re.Match[str] | None":
            assert process.poll() is None, screen.read_text()
            return ready.search(screen.read_text())

        yield wait_until(look, "the worker is ready")[1]
    finally:
        process.kill()  # its child processes end with it
        process.wait()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = shutil.which("chromium")
    assert program is not None, "chromium is missing; `make check-deploy` installs it"
    options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=program, args=options)


@pytest.fixture
def visit(browser: Browser, url: str) -> Iterator[Open]:
    """Return a function that opens the page; the console has no errors at the end of the test."""
    errors: list[str] = []
    pages: list[Page] = []

    def visit(address: str = url, *, width: int = 1280, scheme: Any = "light") -> Page:
        viewport: Any = {"width": width, "height": 800}
        context = browser.new_context(viewport=viewport, color_scheme=scheme)
        context.set_default_timeout(20_000)
        page = context.new_page()
        pages.append(page)
        page.on("pageerror", lambda error: errors.append(str(error)))

        def note(message: Any) -> None:
            # Chromium writes a line for each answer that is an error, which tests ask for.
            if message.type == "error" and "Failed to load resource" not in message.text:
                errors.append(message.text)

        page.on("console", note)
        page.goto(address)
        return page

    yield visit
    for page in pages:
        page.context.close()
    assert errors == []


def job(page: Page, url: str) -> Any:
    """Return the job that the page shows, at its end."""
    found = re.search(r"#/jobs/([\w-]+)", page.url)
    assert found is not None, page.url
    return requests.get(f"{url}v1/jobs/{found[1]}", params={"wait": "60"}, timeout=70).json()


def drawn(url: str, request: dict[str, Any], label: str | None = None) -> str:
    """Draw a request without the page; return the id of the job."""
    query = {"wait": "60", **({"label": label} if label else {})}
    answer = requests.post(f"{url}v1/jobs", params=query, json=request, timeout=70)
    assert answer.json()["status"]["state"] == "SUCCESS", answer.text
    return str(answer.json()["id"])


def press_draw(page: Page) -> None:
    """Press Draw, and wait for the address of the new job."""
    before = page.url
    page.get_by_role("button", name="Draw", exact=False).first.click()
    page.wait_for_url(lambda address: address != before)


def require_fits(page: Page) -> None:
    """Require that nothing is wider than the window."""
    wide = page.evaluate("document.documentElement.scrollWidth - innerWidth")
    assert wide <= 0


def require_accessible(page: Page) -> None:
    """Require that axe-core finds nothing serious."""
    found = Axe().run(page).response["violations"]
    serious = [each for each in found if each["impact"] in ("serious", "critical")]
    assert serious == [], json.dumps(serious, indent=1)


@pytest.mark.parametrize(("width", "scheme"), SCREENS)
def test_two_loras_are_drawn_and_one_is_left_out_beside_it(
    visit: Open, url: str, *, width: int, scheme: str
) -> None:
    """By keyboard: the receipt says what each LoRA changed, and the second image lacks one."""
    page = visit(width=width, scheme=scheme)
    page.get_by_label("Prompt", exact=True).fill("a portrait")
    page.get_by_label("Steps").fill("4")
    page.get_by_label("Name or address of a LoRA").fill("anime-style")
    page.keyboard.press("Enter")
    page.get_by_label("Name or address of a LoRA").fill("demo://neon-lights")
    page.keyboard.press("Enter")
    page.keyboard.type("0.5")  # the focus is on the weight of the new LoRA
    page.keyboard.press("Control+Enter")

    expect(page.get_by_role("button", name="Vary seed")).to_be_visible()
    receipt = page.get_by_role("complementary", name="Receipt")
    expect(receipt).to_contain_text("anime-style")
    expect(receipt).to_contain_text("weight 0.5 · 118 layers · rank 4, 12")
    require_fits(page)
    first = job(page, url)["result"]
    assert [spec["weight"] for spec in first["request"]["loras"]] == [0.8, 0.5]

    page.get_by_role("button", name="Draw without it: neon-lights").click()
    expect(page.get_by_text("With anime-style, neon-lights")).to_be_visible()
    expect(page.get_by_role("figure").filter(has_text="Without neon-lights")).to_be_visible()
    require_fits(page)
    second = job(page, url)["result"]
    assert [spec["adapter_name"] for spec in second["request"]["loras"]] == ["anime-style"]
    assert second["seed"] == first["seed"]

    page.get_by_role("button", name="Again").click()
    expect(page.get_by_text("The same pixels, to the last bit.")).to_be_visible()
    pictures = page.get_by_role("figure").get_by_role("img").all()
    tops = [picture.evaluate("image => image.getBoundingClientRect().top") for picture in pictures]
    assert (len(tops), len(set(tops))) == (2, 1)  # side by side, whatever is below them


@pytest.mark.parametrize(("width", "scheme"), SCREENS)
def test_a_running_job_is_cancelled_also_after_a_reload(
    visit: Open, url: str, *, width: int, scheme: str
) -> None:
    page = visit(width=width, scheme=scheme)
    page.get_by_label("Prompt", exact=True).fill("a city")
    page.get_by_label("Steps").fill("200")
    press_draw(page)
    expect(page.get_by_text(re.compile(r"Step \d+ of 200"))).to_be_visible()
    expect(page.get_by_alt_text("The image so far")).to_be_in_viewport(ratio=1)
    expect(page.get_by_role("button", name="Cancel")).to_be_in_viewport(ratio=1)

    page.reload()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("a city")
    page.get_by_role("button", name="Cancel").click()

    expect(page.get_by_role("heading", name="Cancelled")).to_be_visible()
    assert job(page, url)["error"]["code"] == "job_revoked"
    require_fits(page)


@pytest.mark.parametrize(("width", "scheme"), SCREENS)
def test_a_job_of_the_gallery_fills_the_form_with_all_of_its_recipe(
    visit: Open, url: str, *, width: int, scheme: str
) -> None:
    """Also with what the form has no fields for: the next job has the same request."""
    request = {
        **SMALL,
        "prompt": "a woman (with blue hair:1.1)",
        "prompt_syntax": "a1111",
        "negative_prompt": "trees",
        "clip_skip": 1,
        "scheduler": "unipc",
        "num_images": 2,
        "output_format": "webp",
        "loras": [
            {"file": {"url": "demo://anime-style"}, "weight": -0.5, "end": 0.5, "strict": False}
        ],
    }
    first = drawn(url, request)
    page = visit(f"{url}#/gallery", width=width, scheme=scheme)
    card = page.get_by_role("listitem").filter(has_text="a woman (with blue hair:1.1)").first
    expect(card).to_contain_text(re.compile("2 images · 64 . 64 · 4 steps · seed 7"))
    require_fits(page)

    card.get_by_role("link").click()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("a woman (with blue hair:1.1)")
    expect(page.get_by_role("figure")).to_have_count(2)
    page.get_by_label("Show the image while").uncheck()
    press_draw(page)
    expect(page.get_by_role("figure")).to_have_count(2)

    results = [requests.get(f"{url}v1/jobs/{first}", timeout=10).json(), job(page, url)]
    assert results[0]["id"] != results[1]["id"]
    assert results[0]["result"]["request"] == results[1]["result"]["request"]


def test_the_gallery_loads_more_jobs_as_it_is_scrolled(visit: Open, url: str) -> None:
    for number in range(30):
        body = {"prompt": f"number {number}"}
        requests.post(f"{url}v1/jobs", params={"expires_in": 0.001}, json=body, timeout=10)
    page = visit(f"{url}#/gallery", width=360)
    cards = page.locator("#cards > li")
    expect(cards).to_have_count(24)
    expect(cards.first).to_contain_text("expired")

    page.get_by_role("button", name="Show more").scroll_into_view_if_needed()

    expect(cards.nth(29)).to_be_attached()


@pytest.mark.parametrize(("width", "scheme"), SCREENS)
def test_a_sweep_is_a_grid_with_its_values(
    visit: Open, url: str, *, width: int, scheme: str
) -> None:
    page = visit(width=width, scheme=scheme)
    page.get_by_label("Prompt", exact=True).fill("a portrait")
    page.get_by_label("Steps").fill("4")
    page.get_by_role("button", name="+ anime-style").click()
    page.get_by_text("Sweep", exact=True).click()
    page.get_by_role("button", name="Add an axis").click()
    for values, count in (("5-1", 5), ("9-1 (-2)", 5), ("1-3, 7, 0-1 (+0.5)", 7), ("0-1 [3]", 3)):
        page.get_by_label("Values of the axis").fill(values)
        expect(page.get_by_text(f"{count} images", exact=True)).to_be_visible()
    page.get_by_role("button", name="Add an axis").click()
    page.get_by_label("Field of the axis").nth(1).select_option("Seed")
    page.get_by_label("Values of the axis").nth(1).fill("5-6")
    expect(page.get_by_text(re.compile("3 . 2 = 6 images"))).to_be_visible()
    press_draw(page)

    grid = page.get_by_role("table")
    expect(grid.get_by_role("columnheader")).to_have_text(["Seed 5", "Seed 6"])
    expect(grid.get_by_role("rowheader")).to_have_text(
        ["anime-style 0", "anime-style 0.5", "anime-style 1"]
    )
    expect(grid.get_by_role("img")).to_have_count(6)
    receipt = page.get_by_role("complementary", name="Receipt")
    expect(receipt).to_contain_text(re.compile("up to .* %weight 1 in the image that it changes"))
    require_fits(page)

    grid.get_by_role("button", name="Use the values of anime-style 0.5, Seed 6").click()
    expect(page.get_by_label("Seed", exact=True)).to_have_value("6")
    expect(page.get_by_label("Weight of anime-style", exact=True)).to_have_value("0.5")


def test_a_sweep_over_a_field_without_a_choice_is_filled_as_it_was(visit: Open, url: str) -> None:
    request = {**SMALL, "prompt": "a tower", "sweep": {"clip_skip": [0, 1]}}
    page = visit(f"{url}#/jobs/{drawn(url, request)}/fill")
    expect(page.get_by_label("Values of the axis")).to_have_value("[0,1]")
    press_draw(page)

    expect(page.get_by_role("columnheader")).to_have_text(["clip_skip 0", "clip_skip 1"])
    assert job(page, url)["result"]["request"]["sweep"] == request["sweep"]


@pytest.mark.parametrize(("width", "scheme"), SCREENS)
def test_an_error_is_shown_at_its_field(visit: Open, *, width: int, scheme: str) -> None:
    """Those of the form, of the server, and of a job that has failed; the focus goes there."""
    page = visit(width=width, scheme=scheme)
    page.get_by_role("button", name="+ anime-style").click()
    page.get_by_role("button", name="+ neon-lights").click()
    weight = page.get_by_label("Weight of neon-lights", exact=True)
    weight.fill("9")
    page.keyboard.press("Control+Enter")
    expect(weight).to_have_accessible_description(re.compile("<= 4.0; the value is 9"))
    expect(weight).to_be_focused()
    require_fits(page)
    require_accessible(page)

    weight.fill("1")
    steps = page.get_by_label("Steps")
    steps.fill("0")
    page.keyboard.press("Control+Enter")
    expect(steps).to_have_accessible_description("Expected a whole number >= 1; the value is 0")
    note, field = page.locator("#field-error").bounding_box(), steps.bounding_box()
    assert note is not None
    assert field is not None
    assert note["width"] > 2 * field["width"]

    steps.fill("4")
    other = page.get_by_label("Other fields of the request")
    page.get_by_text("More", exact=True).click()
    other.fill("{")
    page.keyboard.press("Control+Enter")
    expect(other).to_have_accessible_description(re.compile("Expected a JSON object"))

    other.fill('{"clip_skip": 1000}')
    page.keyboard.press("Control+Enter")
    expect(other).to_have_accessible_description(re.compile("<= 100; the value is 1000"))

    other.fill("")
    page.get_by_label("Name or address of a LoRA").fill("anime-stile")
    page.keyboard.press("Enter")
    page.keyboard.press("Control+Enter")
    unknown = page.get_by_label("Weight of anime-stile", exact=True)
    expect(unknown).to_have_accessible_description(re.compile("nearest names: anime-style"))

    page.get_by_role("button", name="Remove anime-stile").click()
    page.get_by_label("Name or address of a LoRA").fill("demo://nothing")
    page.keyboard.press("Enter")
    page.keyboard.press("Control+Enter")
    failed = page.get_by_label("Weight of nothing", exact=True)
    expect(failed).to_have_accessible_description(re.compile("demo://nothing: expected"))
    expect(page.get_by_role("heading", name="This job has failed")).to_be_visible()


def test_a_job_that_nobody_has_leaves_no_other_on_the_stage(visit: Open, url: str) -> None:
    page = visit(f"{url}#/jobs/{drawn(url, {**SMALL, 'prompt': 'a city'})}")
    expect(page.get_by_role("figure")).to_be_visible()

    page.goto(f"{url}#/jobs/nobody")

    expect(page.get_by_role("alert")).to_be_visible()
    expect(page.get_by_role("figure")).to_be_hidden()
    expect(page.get_by_role("complementary", name="Receipt")).to_be_hidden()


def test_a_job_that_is_chosen_is_in_view(visit: Open, url: str) -> None:
    """On a phone the form is above the picture, and recent jobs are below."""
    first, second = (drawn(url, {**SMALL, "prompt": prompt}) for prompt in ("a cup", "a ball"))
    page = visit(f"{url}#/jobs/{first}", width=360)
    picture = page.get_by_role("figure").get_by_role("img")
    expect(picture).to_have_attribute("alt", "a cup")
    expect(picture).to_be_in_viewport(ratio=1)

    page.locator(f'[data-job="{second}"]').click()

    expect(picture).to_have_attribute("alt", "a ball")
    expect(picture).to_be_in_viewport(ratio=1)


def test_a_seed_and_the_defaults_are_shown_in_full(visit: Open, url: str) -> None:
    """The greatest seed fits in its field; steps that no request names are not in the gallery."""
    ident = drawn(url, {"prompt": "a lake", "sweep": {"num_inference_steps": [1, 2]}})
    page = visit(f"{url}#/gallery", width=360)
    card = page.get_by_role("listitem").filter(has_text="a lake").first
    expect(card).to_contain_text(re.compile("sweep of 2 · 64 . 64 · seed"))

    page.goto(f"{url}#/jobs/{ident}")
    expect(page.get_by_label("Scheduler", exact=True)).to_contain_text("Default: ")
    seed = page.get_by_label("Seed", exact=True)
    seed.fill(str(MAX_SEED))
    assert seed.evaluate("input => input.scrollWidth <= input.clientWidth")


def test_text_of_others_stays_text(visit: Open, url: str) -> None:
    """Markup in prompts, names of LoRAs and labels runs nothing and makes no elements."""
    lora = {"file": {"url": "demo://anime-style"}, "adapter_name": MARKUP}
    ident = drawn(url, {**SMALL, "prompt": MARKUP, "loras": [lora]}, f"note={MARKUP}")
    sweep = {"loras[0].weight": [0, 1], "prompt": [MARKUP, "a portrait"]}
    swept = drawn(url, {**SMALL, "prompt": "", "loras": [lora], "sweep": sweep})

    page = visit(f"{url}#/jobs/{ident}/fill")
    expect(page.get_by_role("complementary", name="Receipt")).to_contain_text(f"note{MARKUP}")
    expect(page.get_by_label("Prompt", exact=True)).to_have_value(MARKUP)
    page.goto(f"{url}#/jobs/{swept}")
    expect(page.get_by_role("rowheader").first).to_contain_text("<img src=x")
    page.goto(f"{url}#/gallery")
    expect(page.get_by_text(f"note: {MARKUP[:20]}")).to_be_visible()
    page.goto(f"{url}#/jobs/{MARKUP}")
    page.get_by_label("Name or address of a LoRA").fill(f"https://example.org/{MARKUP}")
    page.keyboard.press("Enter")

    assert page.title() == "zlora"
    assert page.locator("img[src=x]").count() == 0


def test_a_picture_is_drawn_from_a_file_and_from_the_picture_before(
    visit: Open, url: str, tmp_path: Path
) -> None:
    file = tmp_path / "start.png"
    Image.new("RGB", (64, 64), "orange").save(file)
    page = visit()
    page.get_by_text("Start from an image").click()
    page.get_by_label("Or a file").set_input_files(file)
    expect(page.get_by_alt_text("start.png")).to_be_visible()
    page.get_by_label("Strength", exact=True).fill("0.5")
    page.get_by_label("Size", exact=True).select_option("96 64")
    expect(page.get_by_label("Width", exact=True)).to_have_value("96")
    page.get_by_label("Steps").fill("8")
    press_draw(page)
    page.get_by_role("button", name="Start from it").click()
    first = job(page, url)["result"]
    assert first["image_receipt"]["width"] == 64
    assert (first["images"][0]["width"], first["images"][0]["height"]) == (96, 64)

    press_draw(page)
    expect(page.get_by_role("button", name="Start from it")).to_be_visible()
    expect(page.get_by_role("complementary", name="Receipt")).to_be_visible()
    source = job(page, url)["result"]["image_receipt"]["source"]
    assert source == f"job:{first['job_id']}#0"


def test_a_key_is_asked_for_and_sent_with_images_and_events(
    visit: Open, home: Path, url: str, tmp_path: Path
) -> None:
    text, key = new_key("shop", now=0)
    keys = tmp_path / "keys.json"
    write(keys, KeyFile(tenants={"shop": Tenant()}, keys=(key,)))
    assert url  # the worker runs
    broker = config.recorded_broker(home)
    assert broker is not None
    with serve(broker, ZLORA_API_KEYS=str(keys), ZLORA_HOME=str(home)) as base:
        page = visit(f"{base}/")
        dialog = page.get_by_role("dialog", name="API key")
        dialog.get_by_label("Key").fill("zl_wrong")
        page.keyboard.press("Enter")
        expect(dialog).to_contain_text("does not know this key")
        require_accessible(page)
        dialog.get_by_label("Key").fill(text)
        page.keyboard.press("Enter")
        page.get_by_label("Prompt", exact=True).fill("a portrait")
        page.get_by_label("Steps").fill("4")
        page.keyboard.press("Control+Enter")

        image = page.get_by_role("figure").get_by_role("img")
        expect(image).to_have_js_property("naturalWidth", 64)
        expect(image).to_have_attribute("src", re.compile("^blob:"))
        assert text not in page.content()
        page.get_by_role("button", name="Change key").click()
        expect(dialog).to_be_visible()
        page.keyboard.press("Escape")
        expect(dialog).to_be_hidden()


def test_a_key_that_comes_late_brings_what_the_queue_serves(
    visit: Open, home: Path, url: str, tmp_path: Path
) -> None:
    text, key = new_key("late", now=0)
    keys = tmp_path / "keys.json"
    write(keys, KeyFile(tenants={"late": Tenant()}, keys=(key,)))
    assert url  # the worker runs
    broker = config.recorded_broker(home)
    assert broker is not None
    with serve(broker, ZLORA_API_KEYS=str(keys), ZLORA_HOME=str(home)) as base:
        page = visit(f"{base}/")
        dialog = page.get_by_role("dialog", name="API key")
        expect(dialog).to_be_visible()
        page.keyboard.press("Escape")
        expect(page.get_by_text("Describe an image, and press Draw.")).to_be_visible()
        page.get_by_label("Prompt", exact=True).fill("a portrait")
        page.get_by_label("Steps").fill("4")
        page.keyboard.press("Control+Enter")
        dialog.get_by_label("Key").fill(text)
        page.keyboard.press("Enter")

        expect(page.locator("#served")).to_contain_text("SDXL")
        expect(page.get_by_role("button", name="+ anime-style")).to_be_visible()
        expect(page.get_by_label("Guidance")).to_have_attribute("placeholder", re.compile(r"\d"))
        expect(page.get_by_role("figure").get_by_role("img")).to_be_visible()


def test_a_stream_that_breaks_is_opened_again_where_it_was(visit: Open, url: str) -> None:
    ident = drawn(url, {**SMALL, "prompt": "a city"})
    opened: list[str | None] = []
    page = visit("about:blank")

    def running(route: Route) -> None:
        answer = requests.get(f"{url}v1/jobs/{ident}", timeout=10).json()
        route.fulfill(json={**answer, "result": None, "status": {"state": "STARTED"}})

    def broken(route: Route) -> None:
        opened.append(route.request.headers.get("last-event-id"))
        if len(opened) > 1:
            route.continue_()
            return
        status = json.dumps({"state": "PROGRESS", "phase": "denoising", "step": 3, "steps": 9})
        body = f"retry: 10\n\n: alive\n\nevent: status\nid: abc\ndata: {status}\n\nevent: sta"
        route.fulfill(content_type="text/event-stream", body=body)

    def nothing(route: Route) -> None:
        route.fulfill(json={"jobs": [], "cursor": None})

    page.route("**/v1/jobs?*", nothing)
    page.route(f"**/v1/jobs/{ident}", running)
    page.route("**/events", broken)
    page.goto(f"{url}#/jobs/{ident}")

    expect(page.get_by_text("The server does not answer; asking again")).to_be_visible()
    expect(page.get_by_role("progressbar")).to_have_js_property("value", 3 / 9)
    expect(page.get_by_role("button", name="Vary seed")).to_be_visible()
    assert opened == [None, "abc"]


def test_the_form_offers_what_the_queue_serves(visit: Open, url: str) -> None:
    """Of Z-Image: no weights in prompts, no previews, sides in steps of 16; of two models, one."""

    def ask() -> Any:
        answer = requests.get(f"{url}v1/queue", timeout=10)
        return answer.json() if answer.ok else None

    record = wait_until(ask, "the worker says what it serves") | {
        "limits": {"side_step": 16, "prompts": "chat"},
        "models": ["demo", "other"],
        "width": 1024,
        "height": 1024,
        "num_inference_steps": 9,
        "catalogue": None,
    }
    missing = {"code": "not_found", "detail": "no worker", "retryable": False}
    answers = [(404, "application/problem+json", missing), (200, "application/json", record)]
    sent: list[Any] = []
    page = visit("about:blank")

    def queue(route: Route) -> None:
        status, kind, document = answers[0]
        route.fulfill(status=status, content_type=kind, body=json.dumps(document))
        del answers[: len(answers) - 1]

    def submission(route: Route) -> None:
        if route.request.method == "POST":
            sent.append(route.request.post_data_json)
        route.continue_()

    page.route("**/v1/queue", queue)
    page.route("**/v1/jobs?*", submission)
    page.goto(url)
    expect(page.get_by_text("No worker has its model yet")).to_be_visible()
    expect(page.get_by_text("SDXL · demo · other")).to_be_visible()
    page.get_by_label("Size", exact=True).select_option("1248 832")
    page.get_by_label("Model").select_option("other")
    expect(page.get_by_label("Steps")).to_have_attribute("placeholder", "9")
    page.get_by_text("More", exact=True).click()
    expect(page.get_by_label("File format")).to_be_visible()
    expect(page.get_by_label("Show the image while")).to_be_hidden()
    expect(page.get_by_label("Weights and LoRA tags")).to_be_hidden()
    page.keyboard.press("Control+Enter")

    model = page.get_by_label("Model")
    expect(model).to_have_accessible_description(re.compile("Expected what this queue serves"))
    assert sent == [{"prompt": "", "model": "other", "width": 1248, "height": 832}]


@pytest.mark.parametrize(("width", "scheme"), SCREENS)
def test_axe_finds_nothing_serious(visit: Open, url: str, *, width: int, scheme: str) -> None:
    lora = {"file": {"url": "demo://anime-style"}}
    ident = drawn(url, {**SMALL, "prompt": "a portrait", "loras": [lora]})
    page = visit(f"{url}#/jobs/{ident}/fill", width=width, scheme=scheme)
    expect(page.get_by_role("button", name="Vary seed")).to_be_visible()
    for group in page.locator("summary").all():
        group.click()
    require_accessible(page)
    page.get_by_role("figure").get_by_role("button").click()
    require_accessible(page)
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    page.get_by_role("link", name="Gallery").click()
    expect(page.get_by_role("listitem").first).to_contain_text("seed")
    require_accessible(page)
