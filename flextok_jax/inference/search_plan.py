"""The settings of a search over tokens, and the plan that they give for a generator."""

from collections.abc import Sequence
import dataclasses
from typing import Any

from flextok_jax.core.errors import quote
from flextok_jax.inference import priors, validation
from flextok_jax.inference.priors import Prior

ALGORITHMS = ("beam", "lookahead", "best_of_n")
BRANCHINGS = ("first", "last")
SCHEDULES = ("geometric", "linear", "fixed")
MAX_CANDIDATES = 2**20


@dataclasses.dataclass(frozen=True)
class Settings:
  """How to search.

  Attributes:
    algorithm: "beam"; "lookahead": a beam search whose candidates are extended before they are scored; "best_of_n":
      complete samples, scored once.
    beam_width: beams that are kept after each step.
    candidates: of each beam in a step; of best_of_n all samples.
    schedule: tokens after each step: "geometric" (1, 2, 4, ...), "linear", "fixed" (1, 2, 3, ...), or ascending counts.
    steps: how many steps; fewer if all tokens are drawn before.
    tokens_per_step: of the schedule "linear"; None: tokens / steps, rounded up.
    lookahead: tokens by which "lookahead" extends, greedily; -1: to the end.
    max_lookahead_step: steps from 0 below which it does; -1: all.
    branching: "first": the candidates of a beam differ from the first token of the step on; "last": the tokens of a
      step are shared but for the last, as in the public code of the paper.
    replacement: whether a beam may draw the same token for several candidates.
    greedy: the most likely tokens, instead of draws.
    num_results: how many of the best to return.
    batch_size: rows and pictures at once, about. A prompt's candidates are not divided while they are drawn.
  """

  algorithm: str = "beam"
  beam_width: int = 5
  candidates: int = 10
  schedule: str | Sequence[int] = "geometric"
  steps: int = 9
  tokens_per_step: int | None = None
  lookahead: int = 8
  max_lookahead_step: int = -1
  branching: str = "first"
  replacement: bool = False
  greedy: bool = False
  num_results: int = 1
  batch_size: int = 128


def make_settings(given: dict[str, Any]) -> Settings:
  """Returns the settings that are given by name, and the defaults of the others.

  Raises:
    ValueError: no such setting.
  """
  known = {field.name for field in dataclasses.fields(Settings)}
  for name in given:
    if name not in known:
      raise ValueError(f"search has no setting {quote(name)}: its settings are {', '.join(sorted(known))}")
  return Settings(**given)


@dataclasses.dataclass(frozen=True)
class Plan:
  """Checked settings of a search."""

  counts: tuple[int, ...]  # tokens after each step
  width: int
  candidates: int
  num_results: int
  lookahead: int  # tokens; 0: none
  max_lookahead_step: int
  branch_first: bool
  replacement: bool
  greedy: bool
  batch_size: int

  def lookahead_to(self, step: int, most: int) -> int:
    """Returns the number of tokens to which candidates of a step are extended to be scored."""
    ahead = self.lookahead if self.max_lookahead_step < 0 or step < self.max_lookahead_step else 0
    return most if ahead < 0 else min(self.counts[step] + ahead, most)


def make_plan(prior: Prior, settings: Settings) -> Plan:
  """Returns checked settings of a search over the tokens of a prior.

  Raises:
    ValueError: a setting out of range, or that has no effect.
  """
  s, most = settings, prior.num_tokens
  for name, value, allowed in (("algorithm", s.algorithm, ALGORITHMS), ("branching", s.branching, BRANCHINGS)):
    if value not in allowed:
      raise ValueError(f"{name}={quote(value)} must be one of {', '.join(allowed)}")
  greedy, replacement = validation.flag("greedy", s.greedy), validation.flag("replacement", s.replacement)
  batch_size = validation.at_least_one("batch_size", s.batch_size)
  num_results = validation.at_least_one("num_results", s.num_results)
  if s.algorithm == "best_of_n":
    candidates = validation.whole_number("candidates", s.candidates, 1, MAX_CANDIDATES)
    if num_results > candidates:
      raise ValueError(f"num_results={num_results} is more than the {candidates} candidates")
    if greedy:
      raise ValueError("best_of_n draws its samples: greedy=True would draw the same one again")
    # Complete samples of one empty beam: with replacement, they are independent.
    return Plan((most,), 1, candidates, num_results, 0, -1, True, True, False, batch_size)
  if greedy and replacement:
    raise ValueError("replacement=True has no effect when greedy: the most likely tokens are taken")
  if greedy and isinstance(prior, priors.Uniform):
    raise ValueError("greedy=True has no meaning without a generator: all codes are equally likely")
  candidates = validation.whole_number(
    "candidates", s.candidates, 1, MAX_CANDIDATES if replacement else min(MAX_CANDIDATES, prior.num_ids)
  )
  width = validation.whole_number("beam_width", s.beam_width, 1, MAX_CANDIDATES)
  if num_results > width:
    raise ValueError(f"num_results={num_results} is more than beam_width={width}")
  ahead = validation.whole_number("lookahead", s.lookahead, -1, most) if s.algorithm == "lookahead" else 0
  if s.algorithm == "lookahead" and not ahead:
    raise ValueError("lookahead=0 looks at nothing: use algorithm='beam', or -1 for all tokens")
  last = validation.whole_number("max_lookahead_step", s.max_lookahead_step, -1, MAX_CANDIDATES)
  counts = token_counts(s.schedule, s.steps, s.tokens_per_step, most)
  first = s.branching == "first"
  return Plan(counts, width, candidates, num_results, ahead, last, first, replacement, greedy, batch_size)


def token_counts(
  schedule: str | Sequence[int], steps: int, tokens_per_step: int | None, num_tokens: int
) -> tuple[int, ...]:
  """Returns the number of tokens after each step, ascending, at most num_tokens.

  Args:
    schedule: "geometric": 1, 2, 4, ...; "linear": multiples of tokens_per_step; "fixed": 1, 2, 3, ...; or the counts.
    steps: how many; fewer if num_tokens is reached before.
    tokens_per_step: of "linear"; None: num_tokens / steps, rounded up.
    num_tokens: largest number of tokens.

  Raises:
    ValueError: an unknown schedule, or counts that are not ascending or out of range.
  """
  if tokens_per_step is not None and schedule != "linear":
    raise ValueError(f"tokens_per_step={tokens_per_step} is for schedule='linear'")
  if isinstance(schedule, str):
    steps = validation.whole_number("steps", steps, 1, num_tokens if schedule != "geometric" else 2**31 - 1)
    if schedule == "geometric":
      counts = [2**i for i in range(min(steps, num_tokens.bit_length() + 1))]
    elif schedule == "linear":
      size = -(-num_tokens // steps) if tokens_per_step is None else tokens_per_step
      counts = [(i + 1) * validation.at_least_one("tokens_per_step", size) for i in range(steps)]
    elif schedule == "fixed":
      counts = list(range(1, steps + 1))
    else:
      raise ValueError(f"schedule={schedule!r} must be one of {', '.join(SCHEDULES)}, or token counts")
    counts = [min(count, num_tokens) for count in counts]
    return tuple(dict.fromkeys(counts))
  counts = [validation.whole_number("schedule", count, 1, num_tokens) for count in schedule]
  if not counts or sorted(set(counts)) != counts:
    raise ValueError(f"schedule={schedule!r:.80} must be ascending token counts")
  return tuple(counts)
