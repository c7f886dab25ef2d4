"""The demo with the models that ship, driven in Debian's chromium: uploads, slider, drawing, two users, no request
elsewhere. With FLEXTOK_DEMO_IMAGES=docs/images it also remakes the pictures of docs/demo.md.
"""

import contextlib
import io
import os
from pathlib import Path
import re
import socket

from PIL import Image
import pytest

import flextok_jax
from flextok_jax import demo
from flextok_jax.data.sources import synthetic
from flextok_jax.tools.demo import model as model_lib

CHROMIUM = "/usr/bin/chromium"
TIMEOUT = 30_000  # ms
IMAGES = os.environ.get("FLEXTOK_DEMO_IMAGES")


@pytest.fixture(scope="module")
def browser():
  playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
  if not Path(CHROMIUM).exists():
    pytest.skip(f"{CHROMIUM} is not installed")
  with playwright.sync_playwright() as driver:
    opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
    yield opened
    opened.close()


@contextlib.contextmanager
def serve(tokenizer, generator, folder):
  """Serves the page of two models that ship; gives its address."""
  pytest.importorskip("gradio", reason="the extra demo is not installed")
  from flextok_jax.tools.demo import server

  models = model_lib.Models(flextok_jax.load(tokenizer), flextok_jax.load_ar(generator))
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  page, found = server.start(models, str(folder), "127.0.0.1", port)
  yield found
  page.close(verbose=False)


@pytest.fixture(scope="module")
def address(browser, tmp_path_factory):
  with serve(demo.TOKENIZER, demo.GENERATOR, tmp_path_factory.mktemp("uploads")) as found:
    yield found


@pytest.fixture
def user(browser, address, tmp_path):
  """Opens the page for a user of their own; requests elsewhere and errors of the page fail the test."""
  contexts, requests, errors = [], [], []

  def open_page():
    context = browser.new_context(viewport={"width": 1180, "height": 900})
    contexts.append(context)
    page = context.new_page()
    page.set_default_timeout(TIMEOUT)
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    page.wait_for_selector("#stage img")
    return page

  yield open_page
  for i, context in enumerate(contexts):
    context.pages[0].screenshot(path=tmp_path / f"user_{i}.png", full_page=True)
    context.close()
  assert requests and not [url for url in requests if not url.startswith((address, "data:", "blob:"))]
  assert not errors


def scene(number, path):
  Image.fromarray(synthetic.Synthetic("validation", 64, "plain")[number]["image"]).save(path)
  return path


def upload(page, path):
  page.locator("input[type=file]").first.set_input_files(path)


def tokens(page):
  """Returns the texts of the chips, "NUMBER\\nID"."""
  return page.locator("#chips .ft-chip").all_inner_texts()


def changed(page, before):
  """Waits until the tokens are others, and returns them."""
  chips = "[...document.querySelectorAll('#chips .ft-chip')].map(chip => chip.innerText)"
  page.wait_for_function(f"before => JSON.stringify({chips}) != JSON.stringify(before)", arg=before)
  return tokens(page)


def slide(page, count):
  page.locator("#slider input[type=number]").fill(str(count))
  page.wait_for_function(f"document.querySelector('#stage').innerText.includes('first {count} tokens')")


def keep(page, name, top=None):
  """Saves what is seen, or what is below the text `top`, for the documentation, if it is asked for."""
  if IMAGES:
    page.evaluate("scrollTo(0, 0)")
    page.wait_for_timeout(500)
    picture = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
    above = 0 if top is None else page.get_by_text(top).bounding_box()["y"] - 24
    picture.crop((90, above, picture.width - 90, picture.height)).save(f"{IMAGES}/demo_{name}.png", optimize=True)


def test_upload_slider_chips_and_noise(user, tmp_path):
  page = user()
  keep(page, "tokens")
  before = tokens(page)
  upload(page, scene(40, tmp_path / "scene.png"))
  assert len(changed(page, before)) == 32
  for count in (2, 32, 9):
    slide(page, count)
    assert page.locator("#chips .ft-chip.on").count() == count
  page.locator("#chips .ft-chip").nth(5).click()  # the sixth
  page.wait_for_function("document.querySelector('#stage').innerText.includes('first 6 tokens')")
  assert page.locator("#slider input[type=number]").input_value() == "6"
  picture = page.locator("#stage img").last.get_attribute("src")
  page.locator("#noise").click()
  page.wait_for_function("old => [...document.querySelectorAll('#stage img')].at(-1).src != old", arg=picture)


def test_tokens_are_replaced_mixed_and_edited(user):
  page = user()
  before = tokens(page)
  page.get_by_text("Edit tokens").click()
  page.get_by_text("Replace this token by others").click()
  page.wait_for_selector("#replaced img")
  page.get_by_text("Mix two pictures").click()
  page.locator(".ft-pick").nth(6 + 3).click()  # the fourth example as picture B
  page.wait_for_function("document.querySelectorAll('#mixed .ft-chip.b').length == 30")
  keep(page, "mix", top="Edit tokens")
  field = page.locator("#tokens textarea, #tokens input")
  field.fill("1 2 4375")
  field.press("Enter")
  page.locator(".toast-body").filter(has_text="token 3 is '4375': ids are whole numbers, 0 to 4374").wait_for()
  field.fill("1, 2, 3")
  field.press("Enter")
  assert changed(page, before)[:4] == ["1\n1", "2\n2", "3\n3", "4\n·"]


def test_a_picture_is_drawn_token_by_token(user):
  page = user()
  page.get_by_role("tab").nth(1).click()
  page.locator("#draw").click()
  page.wait_for_function("document.querySelector('#drawn').innerText.includes('it stopped by itself')")
  count = page.locator("#drawn .ft-chip.on").count()
  assert 0 < count < 32
  shown = {n for n in (1, 2, 4, 8, 16, *range(1, 33, 2)) if n < count} | {count}
  assert page.locator("#drawn img").count() == 1 + len(shown)  # and the strip
  keep(page, "draw")


def test_uploads_that_are_refused_say_why(user, tmp_path, monkeypatch):
  from flextok_jax.tools.demo import server

  page = user()
  before = tokens(page)
  (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
  (tmp_path / "large.png").write_bytes(bytes(server.MAX_UPLOAD + 1))
  monkeypatch.setattr(model_lib, "MAX_PIXELS", 100)
  for name, told in {
    "broken.png": "the picture cannot be read",
    "large.png": "size",
    scene(1, tmp_path / "many_pixels.png"): "megapixels are more than",
  }.items():
    upload(page, tmp_path / name)
    toast = page.locator(".toast-body").filter(has_text=re.compile(told, re.IGNORECASE)).last
    toast.wait_for()
    page.reload()
    page.wait_for_selector("#stage img")
  assert tokens(page) == before


def test_two_users_at_once_see_their_own_pictures(user, tmp_path):
  pages = [user(), user()]
  before = tokens(pages[0])
  for i, page in enumerate(pages):
    upload(page, scene(50 + i, tmp_path / f"{i}.png"))
  ids = [changed(page, before) for page in pages]
  for count in (3, 5):
    for page in pages:
      page.locator("#slider input[type=number]").fill(str(count))
    for page, own in zip(pages, ids):
      page.wait_for_function(f"document.querySelector('#stage').innerText.includes('first {count} tokens')")
      assert page.locator("#chips .ft-chip.on").all_inner_texts() == own[:count]
  assert ids[0] != ids[1]
  pictures = [page.locator("#stage img").first.get_attribute("src") for page in pages]
  assert pictures[0] != pictures[1]


@pytest.mark.skipif(not IMAGES, reason="remakes a picture of docs/demo.md: set FLEXTOK_DEMO_IMAGES")
def test_a_search_shows_its_steps(browser, tmp_path):
  """The last test: gradio forgets the first server's folder of uploads."""
  with serve("shapes_student", "shapes_ar_stop", tmp_path) as found:
    page = browser.new_page(viewport={"width": 1180, "height": 900})
    page.goto(found)
    page.get_by_role("tab").nth(2).click()
    page.locator("#search").click()
    page.wait_for_selector("#found img")
    keep(page, "search")
