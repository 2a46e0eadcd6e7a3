r"""The three rewards of BRPO, as functions that TRL's trainers call.

Chu et al. (arXiv 2505.23558) train with the sum of three rules: the answer follows the template
(*format*), its conclusion is right (*accuracy*), and its reflections have about the length that is
wished for (*reflection balance*). With N reflections that hold L tokens together, and a target of λ
tokens (100 in the paper), the paper's balance is

.. math:: 1 - \frac{|L / N - \lambda|}{\lambda}

The paper gives neither weights, nor a value at N = 0, nor bounds. Ours: weights belong to the
trainer (1 each by default), and N = 0 pays 0.

**The hole in the paper's form.** It looks at a mean only, so blocks that say nothing move it:

=============================================  =======  ==========
tokens in each reflection (λ = 100)            paper    hardened
=============================================  =======  ==========
one of 100                                      1.0      1.0
one of 200                                      0.0      0.0
one of 200 and an empty one                     1.0      0.0
one of 1000 and nine empty ones                 1.0      0.0
one of 400                                     -2.0      0.0
twenty of 100                                   1.0      0.0
an empty one                                    0.0      0.0
one of 660 and seven of 20                      1.0      0.175
one of 180 and one of 20                        1.0      0.2
one of 150 and one of 50                        1.0      0.5
=============================================  =======  ==========

A model that has learned to ramble is paid in full for opening and closing a second reflection in
which it says nothing, and one very long reflection costs more than a right answer in the right
form earns, so it is safer to never reflect (0). The *hardened* form scores each reflection of a
minimum length by itself, between 0 and 1, and pays the mean of these scores: an answer never earns
more than its best reflection alone, and no length makes up for another. More than a maximum number
of reflections are paid nothing. What the mean still allows: short reflections that score a little
(0.2 at the minimum length) raise the mean of an answer whose other reflections score nothing. It
still sees lengths, not sense: 100 tokens of nothing are 100 tokens.

Everything is counted on token ids: the text that a trainer hands over may have lost the tags.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from ..template import ParsedAnswer, parse_ids, tag_ids
from .accuracy import check_matching, is_missing, is_right

PRESETS: tuple[str, ...] = ("paper", "hardened")
Reward = Callable[..., list[float]]


def paper_balance(lengths: Sequence[int], target_length: float = 100) -> float:
    """The paper's reflection balance: ``1 - abs(L / N - target_length) / target_length``.

    Args:
        lengths: tokens between the tags of each reflection.
        target_length: λ, above 0.

    Returns:
        At most 1, and without a lower bound; 0.0 with no reflection.

    Raises:
        ValueError: a target that is not a finite number above 0.
    """
    _check_target(target_length)
    if not lengths:
        return 0.0
    return 1.0 - abs(sum(lengths) / len(lengths) - target_length) / target_length


def hardened_balance(
    lengths: Sequence[int],
    target_length: float = 100,
    *,
    min_length: int | None = None,
    max_reflections: int = 8,
) -> float:
    """A reflection balance in which no reflection makes up for another; see the head of this file.

    The mean of ``max(0, 1 - abs(length / target_length - 1))`` over the reflections that count.

    Args:
        lengths: tokens between the tags of each reflection.
        target_length: λ, above 0.
        min_length: a shorter reflection does not count; None takes a fifth of the target, at
            least 1.
        max_reflections: more reflections than this, short ones included, pay 0.

    Returns:
        A number in [0, 1]; 0.0 with no reflection that counts.

    Raises:
        ValueError: a target that is not a finite number above 0, or a bound below 1.
    """
    _check_target(target_length)
    least = max(1, math.ceil(target_length / 5)) if min_length is None else min_length
    for name, bound in (("min_length", least), ("max_reflections", max_reflections)):
        if bound < 1:
            raise ValueError(f"{name} must be at least 1, got {bound}")
    if len(lengths) > max_reflections:
        return 0.0
    scores = [max(0.0, 1.0 - abs(one / target_length - 1.0)) for one in lengths if one >= least]
    return sum(scores) / len(scores) if scores else 0.0


def brpo_rewards(
    tokenizer: Any,  # noqa: ANN401 - of any model
    preset: str = "paper",
    target_length: float = 100,
    *,
    matching: str = "auto",
    min_length: int | None = None,
    max_reflections: int = 8,
) -> list[Reward]:
    """The rewards of Balanced Reflective Policy Optimization, for TRL's ``reward_funcs``.

    Each is ``f(completions, completion_ids, **columns) -> list[float]``, one number a completion:

    - ``format_reward``: 1.0 if the answer follows the template to the letter, else 0.0;
    - ``accuracy_reward``: 1.0 if its first conclusion says what the column ``answer`` says, see
      :func:`lookagain_ext.training.accuracy.is_right`, else 0.0;
    - ``reflection_balance_reward``: :func:`paper_balance` or :func:`hardened_balance`.

    ``completions`` are strings or lists of messages and are not read: they may have lost the tags.
    ``completion_ids`` are lists of token ids.

    Args:
        tokenizer: whose tokens they are, with the ten tags as single tokens; or a processor.
        preset: "paper" or "hardened".
        target_length: λ, the tokens that a reflection should have.
        matching: how conclusions are compared: "auto", "exact" or "math".
        min_length: of "hardened".
        max_reflections: of "hardened".

    Raises:
        ValueError: an argument is out of range, or the tokenizer lacks a tag.
        ImportError: ``matching="math"`` without ``math-verify``.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    tag_ids(tokenizer)
    check_matching(matching)

    def balance(lengths: Sequence[int]) -> float:
        if preset == "paper":
            return paper_balance(lengths, target_length)
        return hardened_balance(
            lengths, target_length, min_length=min_length, max_reflections=max_reflections
        )

    balance(())  # refuses bad numbers now, not after the first rollout

    def parsed(completions: Sequence[Any], ids: Sequence[Sequence[int]]) -> list[ParsedAnswer]:
        if len(completions) != len(ids):
            raise ValueError(
                f"completion_ids must be one list for each of {len(completions)} completions, "
                f"got {len(ids)}"
            )
        return [parse_ids(one, tokenizer) for one in ids]

    def format_reward(
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        **columns: Any,  # noqa: ANN401
    ) -> list[float]:
        """1.0 for each answer that follows the template, else 0.0."""
        return [float(one.well_formed) for one in parsed(completions, completion_ids)]

    def accuracy_reward(
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        answer: Sequence[Any] | None = None,
        **columns: Any,  # noqa: ANN401
    ) -> list[float]:
        """1.0 for each conclusion that says the right answer, else 0.0."""
        if answer is None or isinstance(answer, str) or len(answer) != len(completions):
            raise ValueError(
                f"the data must have a column 'answer', one for each of {len(completions)} "
                f"completions, got {answer!r}"[:300]
            )
        for number, wanted in enumerate(answer):
            if is_missing(wanted):
                raise ValueError(
                    f"answer {number} of {len(answer)} is missing ({wanted}): give each row of the "
                    "data an answer, or leave the row out"
                )
        answers = parsed(completions, completion_ids)
        return [
            float(is_right(one.conclusion, wanted, matching))
            for one, wanted in zip(answers, answer, strict=True)
        ]

    def reflection_balance_reward(
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        **columns: Any,  # noqa: ANN401
    ) -> list[float]:
        """How near the lengths of each answer's reflections are to the target."""
        return [balance(one.reflection_lengths) for one in parsed(completions, completion_ids)]

    return [format_reward, accuracy_reward, reflection_balance_reward]


def _check_target(target_length: float) -> None:
    if not (math.isfinite(target_length) and target_length > 0):
        raise ValueError(f"target_length must be a finite number above 0, got {target_length}")
