"""look_again: an unmodified Hugging Face model that looks at the picture again as it reflects."""

from __future__ import annotations

from dataclasses import replace
from types import TracebackType
from typing import Any

from torch import nn

from .attachment import Attachment
from .config import LookAgainConfig
from .engine import Engine
from .models import Family, family_of
from .tokens import find_reflection_token
from .trace import Trace

__all__ = ["LookAgainConfig", "LookAgainSession", "look_again"]


def look_again(
    model: nn.Module,
    config: LookAgainConfig | None = None,
    tokenizer: Any = None,  # noqa: ANN401 - tokenizers and processors share no base class
) -> LookAgainSession:
    """Make a vision-language model look again whenever it opens a reflection.

    From now on `model.generate(...)` and training forwards show the image's visual tokens to the
    model once more at every `<REFLECTION>` it writes (Qwen Look Again, arXiv 2505.23558), each
    row of a batch by itself. Nothing in the model is replaced: it gets a few hooks and another
    attention function for its text decoder, and `detach()` takes them away. A `copy.deepcopy` of
    the model made meanwhile looks again too, until a session of its own on it is detached.

    While decoding, only generated tokens trigger. In a forward with `labels`, only positions whose
    label is not -100; in one without labels or cache, those after the last visual token. A loop of
    one's own may begin within an answer: labels tell where it began, for ROUTE's attention and the
    trace's steps. Threads may call the model at the same time.

    In a loop of one's own, a call with a cache and one token is a step, and its token a generated
    one; several are a prompt, or another turn of one. In generate, what is passed to it is the
    prompt, but for the last token of an answer that was generated under the session before. A
    cache may be cropped, reset, and its rows reordered, picked and repeated in between: reflections
    follow. What cannot be followed is refused, except within compiled steps, which look at nothing.

    Gradients are right also when `backward()` comes after the session has ended, with gradient
    checkpointing by transformers or PyTorch's `checkpoint_wrapper`. If you call
    `torch.utils.checkpoint` on parts of the model yourself, call `backward()` within the session.

    Args:
        model: a Hugging Face vision-language model of a known family, or a wrapper of one.
        config: how to look again; None takes what was saved as `model.config.lookagain`, else the
            defaults.
        tokenizer: the tokenizer or processor, which tells the id of the reflection token; not
            needed when `config.reflection_token_id` is set.

    Returns:
        A session: a context manager that detaches when it ends, with the `trace`.

    Raises:
        TypeError: if `model` is not a transformers model or `config` no LookAgainConfig.
        ValueError: if the family is not supported, the reflection token is not in the vocabulary
            or is a placeholder of images, or the model shares its config with another one that
            looks again.

    Example:
        >>> with look_again(model, LookAgainConfig(strategy="copy"), processor) as session:
        ...     out = model.generate(**inputs, max_new_tokens=512)
        ...     print(session.trace.summary())
    """
    family = family_of(model)
    if config is None:
        saved = getattr(family.config, "lookagain", None)
        config = LookAgainConfig.from_dict(saved) if saved else LookAgainConfig()
    if not isinstance(config, LookAgainConfig):
        raise TypeError(f"config must be a LookAgainConfig, got {type(config).__name__}")
    if config.reflection_token_id is None:
        number = find_reflection_token(tokenizer, config.reflection_token)
        config = replace(config, reflection_token_id=number)
    if config.looks:  # "off" may name one that is never written: it only counts them
        family.check_token("reflection_token_id", config.reflection_token_id)
    return LookAgainSession(model, family, config)


class LookAgainSession:
    """A model that looks again, from `look_again` until `detach`.

    Sessions on one model may nest: the newest acts, and those before it resume when it detaches.

    Attributes:
        config: the configuration in force, with the reflection token's id.
        model: the model as it was given.
    """

    def __init__(self, model: nn.Module, family: Family, config: LookAgainConfig) -> None:
        self.model = model
        self.config = config
        self._engine = Engine(family, config)
        self._attachment = Attachment.enter(family, self._engine)

    def __enter__(self) -> LookAgainSession:
        """The session itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        """Detach."""
        self.detach()

    def detach(self) -> None:
        """Give the model back as it was before; once is enough, twice does no harm.

        If the model was compiled (`torch.compile`, or by `generate`), this calls
        `torch.compiler.reset()`, as `look_again` does: what the whole process has compiled so far
        is compiled anew when it runs next.
        """
        self._attachment.leave(self._engine)

    @property
    def attached(self) -> bool:
        """Whether the session is in force or waits behind a newer one."""
        return self._engine in self._attachment.engines

    @property
    def trace(self) -> Trace | None:
        """What happened in the latest generation or forward, read from the device now.

        None before the first one.
        """
        return self._engine.trace()
