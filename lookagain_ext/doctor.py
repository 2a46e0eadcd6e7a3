"""Does looking again hold on this model, with these versions, on this machine?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .attachment import is_attached
from .config import LookAgainConfig
from .generation import look_again
from .models import family_of
from .tokens import find_reflection_token

_TOLERANCE = {torch.float64: 1e-4, torch.float32: 2e-3}
_COARSE, _NOISE = 0.1, 4.0
"""Tolerances relative to the spread of the logits. Half-precision types get the coarse one, or a
multiple of what the model's own cache changes, if that is more."""


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        name: what was compared.
        passed: whether it holds.
        difference: largest difference of the logits, relative to their spread.
        words: what it means.
    """

    name: str
    passed: bool
    difference: float
    words: str


@dataclass(frozen=True)
class DoctorReport:
    """What `doctor` found; print it."""

    checks: list[Check]

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    def __str__(self) -> str:
        """One line for each check, and a verdict."""
        lines = [
            f"{'ok  ' if check.passed else 'FAIL'} {check.name}: {check.words} "
            f"(difference {check.difference:.1e})"
            for check in self.checks
        ]
        verdict = "Looking again holds on this model." if self.ok else "Something does not hold."
        return "\n".join([*lines, verdict])


def doctor(
    model: nn.Module,
    inputs: dict[str, Any],
    tokenizer: Any = None,  # noqa: ANN401 - or a processor
    config: LookAgainConfig | None = None,
    *,
    steps: int = 24,
    reflections: Sequence[int] = (4, 12),
) -> DoctorReport:
    """Check on a model of your own that looking again does what it should.

    The model writes `steps` tokens, made to reflect at the given ones. Then the logits of that
    same answer are compared: full forward against token by token, seen-again against physically
    appended rows, switched off against the model without look_again; and that a reflection
    changes anything at all. Packages that reach into a model turn into silent no-ops when the
    model's library changes: this tells.

    Args:
        model: a supported vision-language model; given back as it was.
        inputs: what its processor returns for a prompt with an image.
        tokenizer: as in `look_again`.
        config: what to check; None: COPY.
        steps: tokens to write.
        reflections: steps at which every row reflects.

    Returns:
        A report with `ok`, the `checks`, and a readable `str`.

    Raises:
        ValueError: if the model is not supported or has an open session, the inputs hold no
            image, or a reflection lies outside the answer.
    """
    if not reflections or min(reflections) < 0 or max(reflections) >= steps - 1:
        raise ValueError(
            f"reflections must lie between 0 and {steps - 2} to be seen in {steps} steps, "
            f"got {list(reflections)}"
        )
    family = family_of(model)
    if is_attached(family.model):
        raise ValueError("model has an open look_again session: detach it first")
    ids = inputs["input_ids"]
    visual = torch.tensor(family.visual_token_ids(), device=ids.device)
    if not bool(torch.isin(ids, visual).any(-1).all()):
        raise ValueError("inputs must hold an image in every row")
    config = config or LookAgainConfig()
    if config.reflection_token_id is None:
        number = find_reflection_token(tokenizer, config.reflection_token)
        config = replace(config, reflection_token_id=number)
    if not config.looks:
        raise ValueError("config shows nothing (strategy 'off' or ratio 0): nothing to check")
    return _examine(model, family.model, inputs, config, steps, list(reflections))


@torch.no_grad()
def _examine(
    model: nn.Module,
    inner: nn.Module,
    inputs: dict[str, Any],
    config: LookAgainConfig,
    steps: int,
    reflections: list[int],
) -> DoctorReport:
    with look_again(model, replace(config, strategy="off")):
        forced = dict.fromkeys(reflections, config.reflection_token_id)
        answer, off = _write(inner, inputs, steps, _Script(forced, config, inner))
        whole_off = _read(inner, inputs, answer)
    script = _Script(dict(enumerate(answer.unbind(1))), config, inner)
    _, plain = _write(inner, inputs, steps, script)
    with look_again(model, config):
        _, looked = _write(inner, inputs, steps, script)
        whole = _read(inner, inputs, answer)
    other = "virtual" if config.backend == "append" else "append"
    spread = float(plain.std())
    limit = _TOLERANCE.get(next(inner.parameters()).dtype)
    if limit is None:
        noise = float((whole_off - off).abs().max()) / spread
        limit = min(max(_COARSE, _NOISE * noise), 5 * _COARSE)

    def check(name: str, a: Tensor, b: Tensor, good: str, bad: str) -> Check:
        difference = float((a - b).abs().max()) / spread
        return Check(name, difference <= limit, difference, good if difference <= limit else bad)

    first = reflections[0] + 1
    moved = float((looked[:, first:] - off[:, first:]).abs().max()) / spread
    checks = [
        check(
            "off = the model alone",
            off,
            plain,
            "switched off, the model computes what it always did",
            "even switched off, the model computes something else",
        ),
        check(
            "nothing before the first reflection",
            looked[:, :first],
            off[:, :first],
            "tokens before the first reflection are untouched",
            "tokens before any reflection changed: a prompt token may trigger",
        ),
        Check(
            "a reflection looks",
            moved > limit,
            moved,
            "the image shown again changes what follows"
            if moved > limit
            else "what follows a reflection does not change: the hooks do not reach the model",
        ),
        check(
            "full forward = token by token",
            whole,
            looked,
            "training sees what generation did",
            "training would see something else than generation did",
        ),
        check(
            "the same, switched off",
            whole_off,
            off,
            "the model itself agrees with its own cache",
            "the model alone disagrees with its own cache: not look_again's doing",
        ),
    ]
    if config.backend != "reencode":
        with look_again(model, replace(config, backend=other, keep="all")):
            _, copied = _write(inner, inputs, steps, script)
        checks.append(
            check(
                f"{config.backend} = {other}",
                looked,
                copied,
                "keys seen again equal keys physically appended",
                "keys seen again differ from keys physically appended",
            )
        )
    return DoctorReport(checks)


class _Script:
    """A logits processor that dictates some steps and keeps the others from reflecting."""

    def __init__(self, tokens: dict[int, Any], config: LookAgainConfig, model: nn.Module) -> None:
        self.tokens = tokens
        ends = model.generation_config.eos_token_id
        ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
        self.forbidden = [*ends, config.reflection_token_id]
        self.prompt = -1

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self.prompt
        scores = scores.clone()
        if step not in self.tokens:
            scores[:, self.forbidden] = -torch.inf
            return scores
        wanted = torch.as_tensor(self.tokens[step], device=scores.device).expand(len(scores))
        scores.fill_(-torch.inf)
        return scores.scatter_(1, wanted[:, None], 0.0)


def _write(
    model: nn.Module, inputs: dict[str, Any], steps: int, script: _Script
) -> tuple[Tensor, Tensor]:
    """(answer [B, steps], float32 logits [B, steps, V]), token by token."""
    script.prompt = inputs["input_ids"].shape[1]
    out = model.generate(
        **inputs,
        logits_processor=[script],
        do_sample=False,
        max_new_tokens=steps,
        return_dict_in_generate=True,
        output_logits=True,
        disable_compile=True,
    )
    return out.sequences[:, script.prompt :], torch.stack(out.logits, dim=1)


def _read(model: nn.Module, inputs: dict[str, Any], answer: Tensor) -> Tensor:
    """float32 logits [B, steps, V] of the answer, in one forward."""
    ids, prompt = inputs["input_ids"], inputs["input_ids"].shape[1]
    longer = {"input_ids": answer, "attention_mask": torch.ones_like(answer)}
    longer["mm_token_type_ids"] = torch.zeros_like(answer)
    batch = {
        name: torch.cat([value, longer[name].to(value.dtype)], dim=1) if name in longer else value
        for name, value in inputs.items()
    }
    labels = torch.cat([torch.full_like(ids, -100), answer], dim=1)
    logits = model(**batch, labels=labels, use_cache=False).logits
    return logits[:, prompt - 1 : -1].float()
