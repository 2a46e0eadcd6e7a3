"""How a model looks again."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

_CHOICES = {
    "strategy": ("copy", "route", "off"),
    "backend": ("virtual", "append", "reencode"),
    "route_scope": ("model", "layer"),
    "keep": ("all", "latest"),
}
_MAX_REINJECTIONS = 16


@dataclass(frozen=True)
class LookAgainConfig:
    """How a model looks again when it opens a reflection.

    The strategies are COPY and ROUTE of Qwen Look Again (arXiv 2505.23558). Where the paper is
    silent (rotary positions, several images, repeated reflections, re-encoding or not) the
    choices are this package's own.

    Attributes:
        strategy: "copy" shows all visual tokens again, "route" the most attended, "off" none.
        route_ratio: share of a row's visual tokens that "route" shows, 0 to 1; 1 equals "copy",
            0 equals "off".
        backend: "virtual" sees the cached keys and values at new rotary positions without moving
            them; "append" writes them to the end of the cache: the same numbers, with memory;
            "reencode" runs the visual embeddings through the decoder again: another function.
            Train and decode with the same one ("virtual" and "append" count as one).
        reflection_token: the token that opens a reflection.
        reflection_token_id: its id; None asks the tokenizer.
        route_scope: "model" ranks by the mean over layers and heads, "layer" each layer by its own.
        max_reinjections: re-injections a row can have, 1 to 16.
        keep: what happens past them: "all" keeps those it has, and later reflections are text
            only; "latest" replaces the oldest ("virtual" only).
        track_attention: record the attention on every visual token at every step. Of a forward
            over whole sequences with gradients, the backward counts that of the whole answer (the
            trace's `answer_attention`): on a CPU at next to no cost, on a GPU by a pass over the
            picture's keys. A forward over whole sequences is not tracked with "reencode", nor are
            layers that `torch.compile` compiled.

    Raises:
        ValueError: a value that is not allowed, by name.
    """

    strategy: str = "copy"
    route_ratio: float = 0.5
    backend: str = "virtual"
    reflection_token: str = "<REFLECTION>"
    reflection_token_id: int | None = None
    route_scope: str = "model"
    max_reinjections: int = 8
    keep: str = "all"
    track_attention: bool = False

    def __post_init__(self) -> None:
        """Check every field."""
        for name, choices in _CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                wanted = ", ".join(map(repr, choices))
                raise ValueError(f"{name} must be one of {wanted}, got {value!r}")
        ratio = self.route_ratio
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio <= 1:
            hint = f": did you mean {ratio / 100:g}?" if _is_percentage(ratio) else ""
            raise ValueError(f"route_ratio must lie between 0 and 1, got {ratio!r}{hint}")
        if not isinstance(self.reflection_token, str) or not self.reflection_token:
            got = self.reflection_token
            raise ValueError(f"reflection_token must be the text of a token, got {got!r}")
        number = self.reflection_token_id
        if number is not None and (type(number) is not int or number < 0):
            raise ValueError(
                f"reflection_token_id must be a token's id or None, got {number!r}: an id is an "
                "integer from 0 on"
            )
        if not isinstance(self.track_attention, bool):
            raise ValueError(f"track_attention must be True or False, got {self.track_attention!r}")
        count = self.max_reinjections
        if type(count) is not int or not 1 <= count <= _MAX_REINJECTIONS:
            raise ValueError(
                f"max_reinjections must be an integer from 1 to {_MAX_REINJECTIONS}, got {count!r}"
            )
        if self.keep == "latest" and self.backend != "virtual":
            raise ValueError(
                f"keep='latest' needs backend='virtual', got {self.backend!r}: rows that were "
                "written to a cache cannot be taken out of it"
            )
        if self.route_scope == "layer" and self.backend == "reencode" and self.routes:
            raise ValueError(
                "route_scope='layer' needs backend 'virtual' or 'append': re-encoding sends the "
                "same tokens through all layers"
            )

    @property
    def looks(self) -> bool:
        """Whether a reflection is shown anything at all."""
        return self.strategy == "copy" or (self.strategy == "route" and self.route_ratio > 0)

    @property
    def routes(self) -> bool:
        """Whether the tokens shown depend on attention."""
        return self.strategy == "route" and self.route_ratio > 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as saved in `model.config.lookagain`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LookAgainConfig:
        """The config that `to_dict` wrote.

        Raises:
            ValueError: if a key is unknown, by name.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown LookAgainConfig entries: {', '.join(unknown)}")
        return cls(**values)


def _is_percentage(ratio: object) -> bool:
    return isinstance(ratio, int | float) and not isinstance(ratio, bool) and 1 < ratio <= 100
