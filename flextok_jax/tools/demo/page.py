"""The demo's page (gradio): what its controls do. Everything that is computed is in model.py."""

from collections.abc import Callable
import dataclasses
import functools
from html import escape
import inspect
import math
import statistics
import threading
import time
from typing import Any

import gradio as gr
import numpy as np

from flextok_jax.core.errors import first_line
from flextok_jax.tools.demo import html
from flextok_jax.tools.demo import model as model_lib
from flextok_jax.tools.demo.model import SEARCHES, Ids, Models

SESSION_SECONDS = 3600  # after which an unused picture is forgotten
_FRAME_SECONDS = 0.3
_MOST_FRAMES = 32
_MAX_PROMPT = 200  # characters
_MAX_SEED = 2**31 - 1
_html = functools.partial(gr.HTML, apply_default_css=False)
_HIDDEN = dict(show_progress="hidden", trigger_mode="always_last")  # of events that follow a control while it moves


@dataclasses.dataclass(frozen=True)
class Shown:
  """What a user looks at: a picture uint8 [h, w, 3], tokens, which may have been edited since, and a noise."""

  original: np.ndarray
  ids: Ids
  seed: int = 0


class Answers:
  """Prints the time of each answer to a move of the slider, and the median."""

  def __init__(self) -> None:
    self._seconds: list[float] = []
    self._lock = threading.Lock()

  def record(self, tokens: int, seconds: float) -> None:
    """Prints a line about an answer."""
    with self._lock:
      self._seconds = [*self._seconds[-999:], seconds]
      median, count = statistics.median(self._seconds), len(self._seconds)
    print(
      f"slider: {html.count(tokens)} in {seconds * 1e3:.0f} ms; median of {count}: {median * 1e3:.0f} ms", flush=True
    )


def build(models: Models) -> gr.Blocks:
  """Returns the page of a tokenizer, with tabs for its generator if there is one."""
  n, bits = models.num_tokens, math.log2(models.tokenizer.num_codes)
  text = (
    f"A picture becomes <b>{n} tokens in order</b>: the first says roughly what is there, every further one adds "
    "detail. Any number of them, from the first on, gives a whole picture."
  )
  # Gradio does not serve files of its folder that are older than this.
  with gr.Blocks(title="FlexTok", analytics_enabled=False, delete_cache=(SESSION_SECONDS, SESSION_SECONDS)) as page:
    _html(html.intro("FlexTok: pictures as ordered tokens, coarse to fine", text))
    with gr.Tab("Picture → tokens → picture"):
      _tokens_tab(models, Answers(), bits)
    if models.gen is not None:
      with gr.Tab({"text": "Text → picture", "class": "Class → picture"}.get(models.condition, "Draw a picture")):
        _draw_tab(models)
      with gr.Tab("Search"):
        _search_tab(models)
  return page


def _checked(function: Callable) -> Callable:
  """Makes what the project raises for bad input one line on the page."""

  def error(e: Exception) -> gr.Error:
    return gr.Error(escape(first_line(e, 300)), title="Not possible", print_exception=False)

  if inspect.isgeneratorfunction(function):

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
      try:
        yield from function(*args, **kwargs)
      except (ValueError, OSError) as e:
        raise error(e) from None
  else:

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
      try:
        return function(*args, **kwargs)
      except (ValueError, OSError) as e:
        raise error(e) from None

  return checked


def _drop_zone() -> gr.Image:
  """Returns a place for an uploaded picture, whose value is its path: only data/pictures.py opens the file."""
  zone = gr.Image(show_label=False, sources=["upload", "clipboard"], type="filepath", height=180, buttons=[])

  async def keep(path: str) -> str:
    if "://" in str(path):  # gradio would download it
      raise gr.Error("upload a file: addresses are not opened", print_exception=False)
    return await type(zone).async_move_resource_to_block_cache(zone, path)

  zone.preprocess = lambda payload: None if payload is None else payload.path
  zone.async_move_resource_to_block_cache = keep
  return zone


def _tokens_tab(models: Models, answers: Answers, bits: float) -> None:
  n, examples = models.num_tokens, models.examples()

  # What is shown.

  def view(shown: Shown, k: int) -> tuple[str, str]:
    kept = min(int(k), len(shown.ids))
    (decoded,) = models.decode([(shown.ids, kept)], shown.seed)
    return html.stage(shown.original, decoded, kept, bits), html.chips(shown.ids, kept, n)

  def everything(shown: Shown, k: int) -> tuple:
    strip = html.strip(models.prefixes(shown.ids, shown.seed), shown.original)
    return (shown, *view(shown, k), strip, " ".join(map(str, shown.ids)))

  def open_example(k: int, event: gr.EventData) -> tuple:
    picture, _ = examples[event.i]
    return None, *everything(Shown(picture, models.encode(picture)), k)

  def open_upload(path: str | None, shown: Shown, k: int) -> tuple:
    if path is None:  # cleared
      return everything(shown, k)
    picture = models.read(path)
    return everything(Shown(picture, models.encode(picture)), k)

  # Changes.

  def slide(shown: Shown, k: int) -> tuple[str, str]:
    start = time.perf_counter()
    found = view(shown, k)
    answers.record(int(k), time.perf_counter() - start)
    return found

  def pick(shown: Shown, event: gr.EventData) -> tuple:
    return event.i, *slide(shown, event.i)

  def play(shown: Shown) -> Any:
    for k in range(1, n + 1) if n <= _MOST_FRAMES else models.counts:
      yield k, *view(shown, k)
      time.sleep(_FRAME_SECONDS)

  def new_noise(shown: Shown, k: int) -> tuple:
    return everything(dataclasses.replace(shown, seed=shown.seed + 1), k)

  def edit(text: str, shown: Shown, k: int) -> tuple:
    return everything(dataclasses.replace(shown, ids=models.parse(text)), k)

  def replace(shown: Shown, position: int) -> str:
    if position > len(shown.ids):
      raise ValueError(f"there is no token {position}: {html.count(len(shown.ids))} are given")
    changed = models.variants(shown.ids, int(position), shown.seed)
    titles = ["as it is", *(f"token {position} = {ids[int(position) - 1]}" for ids in changed[1:])]
    return html.row(list(models.decode([(ids, n) for ids in changed], shown.seed)), titles)

  def mix(shown: Shown, other: Shown, cut: int) -> str:
    a, b, cut = shown.ids, other.ids, int(cut)
    both = model_lib.swap(a, b, cut), model_lib.swap(b, a, cut)
    titles = ["A", "B", f"A's first {html.count(cut)}, then B's", f"B's first {html.count(cut)}, then A's"]
    pictures = models.decode([(ids, n) for ids in (a, b, *both)], shown.seed)
    return html.row(list(pictures), titles) + "<br>" + html.chips(both[0], len(both[0]), n, second=cut)

  def mix_example(shown: Shown, cut: int, event: gr.EventData) -> tuple:
    other = Shown(examples[event.i][0], models.encode(examples[event.i][0]))
    return None, other, mix(shown, other, cut)

  def mix_upload(path: str | None, shown: Shown, other: Shown, cut: int) -> tuple:
    if path is not None:
      picture = models.read(path)
      other = Shown(picture, models.encode(picture))
    return other, mix(shown, other, cut)

  # The page, as it looks at first.
  k = min(4, n)
  first, second = (Shown(picture, models.encode(picture)) for picture, _ in examples[:2])
  _, stage_html, chips_html, strip_html, ids_text = everything(first, k)
  state, other = (gr.State(shown, time_to_live=SESSION_SECONDS) for shown in (first, second))
  with gr.Row():
    with gr.Column(scale=1, min_width=280):
      gallery = _html(html.examples(examples), js_on_load=html.CLICK)
      upload = _drop_zone()
    with gr.Column(scale=3):
      stage = _html(stage_html, elem_id="stage")
      slider = gr.Slider(
        1, n, k, step=1, label="Number of tokens, from the first: move me", elem_id="slider", buttons=[]
      )
      chips = _html(chips_html, js_on_load=html.CLICK, elem_id="chips")
      with gr.Row():
        play_button = gr.Button("▶ Play from 1 token on", variant="primary", size="sm")
        noise = gr.Button("🎲 Other noise", size="sm", elem_id="noise")
  strip = _html(strip_html, js_on_load=html.CLICK, elem_id="strip")
  if models.limits:
    _html(html.note(models.limits))
  with gr.Accordion("Edit tokens: what does one of them say?", open=False):
    tokens = gr.Textbox(
      ids_text, label="Tokens", info="Edit or paste, then press Enter.", buttons=["copy"], elem_id="tokens",
      max_length=model_lib.MAX_TEXT,
    )  # fmt: skip
    with gr.Row():
      position = gr.Slider(1, n, min(3, n), step=1, label="Token", buttons=[])
      replace_button = gr.Button("Replace this token by others")
    replaced = _html(elem_id="replaced")
  with gr.Accordion("Mix two pictures: swap their tokens from a position on", open=False), gr.Row():
    with gr.Column(scale=1, min_width=280):
      _html(html.note("Picture A is the one above. Pick picture B:"))
      second_gallery = _html(html.examples(examples), js_on_load=html.CLICK)
      second_upload = _drop_zone()
    with gr.Column(scale=3):
      cut = gr.Slider(1, n, min(2, n), step=1, label="Number of tokens that stay", buttons=[])
      mixed = _html(mix(first, second, min(2, n)), elem_id="mixed")

  # What happens when.
  shows = [state, stage, chips, strip, tokens]
  gallery.click(_checked(open_example), slider, [upload, *shows], show_progress="hidden")
  upload.input(_checked(open_upload), [upload, state, slider], shows)
  slider.input(_checked(slide), [state, slider], [stage, chips], **_HIDDEN)
  for clickable in (chips, strip):
    clickable.click(_checked(pick), state, [slider, stage, chips], **_HIDDEN)
  play_button.click(_checked(play), state, [slider, stage, chips], show_progress="hidden")
  noise.click(_checked(new_noise), [state, slider], shows, show_progress="hidden")
  tokens.submit(_checked(edit), [tokens, state, slider], shows)
  replace_button.click(_checked(replace), [state, position], replaced)
  second_gallery.click(_checked(mix_example), [state, cut], [second_upload, other, mixed], show_progress="hidden")
  second_upload.input(_checked(mix_upload), [second_upload, state, other, cut], [other, mixed])
  cut.input(_checked(mix), [state, other, cut], mixed, **_HIDDEN)


def _condition(models: Models, first: int) -> tuple[Any, Callable]:
  """Returns the control of the condition, at first an example's, and what makes a condition of its value."""
  if models.condition == "text":
    caption = models.captions()[first]
    return gr.Textbox(caption, label="What to draw", max_length=_MAX_PROMPT), lambda text: text.strip() or None
  if models.condition == "class":
    classes = models.classes()
    return gr.Dropdown(classes, value=classes[0][1], label="What to draw"), lambda number: number
  return gr.State(None), lambda _: None


def _suggest(models: Models, condition: Any) -> None:
  if models.condition == "text":
    gr.Examples(models.captions(), condition, label="For example", cache_examples=False)


def _draw_tab(models: Models) -> None:
  assert models.gen is not None
  own = models.gen.config.ar
  n = own.num_tokens
  frames = {*models.counts, *range(1, n + 1, max(1, n // 16))}  # numbers of tokens whose pictures are shown
  with gr.Row():
    with gr.Column(scale=1, min_width=280):
      condition, read = _condition(models, 0)
      with gr.Row():
        go = gr.Button("Draw", variant="primary", elem_id="draw")
        again = gr.Button("Another one")
      temperature = gr.Slider(0.1, 2, own.temperature, label="Temperature", buttons=[])
      top_p = gr.Slider(0, 1, own.top_p, label="Top-p (0: off)", buttons=[])
      most = max(8, own.guidance_scale)
      guidance = gr.Slider(
        1, most, own.guidance_scale, label="Guidance (1: off)", visible=models.condition != "none", buttons=[]
      )
      seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=_MAX_SEED)
      _suggest(models, condition)
    with gr.Column(scale=3):
      ends = ", and the generator decides itself when it is done" * own.stop
      drawn = _html(html.note(f"Press Draw: the picture appears token by token{ends}."), elem_id="drawn")

  def draw(value: Any, seed: int, temperature: float, top_p: float, guidance: float) -> Any:
    given, pictures = read(value), dict[int, np.ndarray]()
    choices = dict(temperature=temperature, top_p=top_p, guidance_scale=guidance if given is not None else 1.0)
    for ids, ended in models.draw(given, int(seed), **choices):
      count = len(ids)
      if count in frames or ended or count == n:
        pictures[count] = (
          pictures[count] if ended and count in pictures else models.decode([(ids, count)], int(seed))[0]
        )
      yield html.growing(pictures, ids, n, f"{count} of {n} tokens{': it stopped by itself' * ended}")

  inputs = [condition, seed, temperature, top_p, guidance]
  private = dict(show_progress="minimal", api_visibility="private")
  go.click(_checked(draw), inputs, drawn, show_progress="minimal")
  again.click(lambda seed: (int(seed) + 1) % _MAX_SEED, seed, seed, **private).then(
    _checked(draw), inputs, drawn, **private
  )
  if models.condition == "text":
    condition.submit(_checked(draw), inputs, drawn, **private)


def _search_tab(models: Models) -> None:
  names = models.verifiers()
  with gr.Row():
    with gr.Column(scale=1, min_width=280):
      condition, read = _condition(models, 1)
      go = gr.Button("Search", variant="primary", elem_id="search")
      how = gr.Radio(list(SEARCHES), value=next(iter(SEARCHES)), label="How")
      verifier = gr.Dropdown(names, value=names[0], label="Verifier", visible=len(names) > 1)
      seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=_MAX_SEED)
      _suggest(models, condition)
    with gr.Column(scale=3):
      what = "whether a picture shows what the text says" if names[0] == "scenes" else "how likely the tokens are"
      text = f"A search draws several sequences, a verifier scores {what}, and the best are kept. Press Search."
      found = _html(html.note(text), elem_id="found")

  def search(value: Any, seed: int, verifier: str, how: str) -> str:
    given = read(value)
    steps = models.search(given, int(seed), verifier, how)
    *_, (ids, _) = models.draw(given, int(seed))
    (plain,) = models.decode([(ids, len(ids))], int(seed))
    ahead = SEARCHES[how]["algorithm"] == "lookahead" and verifier != "likelihood"
    return html.search(steps, plain, verifier, ahead)

  go.click(_checked(search), [condition, seed, verifier, how], found)
