"""Hooks and settings that look_again puts on a model, and takes away again."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.configuration_utils import GenerationMode

from .attention import ATTENTION_NAME
from .cache import CACHE, lasting
from .checkpointing import keep_attention, release_attention
from .config import LookAgainConfig
from .engine import Engine
from .models import Family

_NAME = "_lookagain"
"""Attribute of the model that holds its attachment: the two live and are copied together."""

_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
_IN_USE: weakref.WeakValueDictionary[int, Attachment] = weakref.WeakValueDictionary()
"""Attachments by the id of the text config that they switched."""


class _Missing(Enum):
    """What was not there; an enum's member is itself also in a copy and when read from a file."""

    MISSING = "missing"


_MISSING = _Missing.MISSING


class _Forbid(LogitsProcessor):
    """Forbids tokens: one operation a step, where transformers' own makes its mask anew."""

    def __init__(self, tokens: tuple[int, ...]) -> None:
        self.tokens = tokens
        self._index: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores, -inf at the tokens; ids past the vocabulary are nobody's."""
        if self._index is None or self._index.device != scores.device:
            known = [token for token in self.tokens if token < scores.shape[-1]]
            self._index = torch.tensor(known, dtype=torch.int64, device=scores.device)
        return scores.index_fill(-1, self._index, -torch.inf)


class _Processors(LogitsProcessorList):
    """Those of a generation: if one calls the model, to score, that is no part of the answer."""

    def __init__(self, processors: list[Any], engine: Engine) -> None:
        super().__init__(processors)
        self._engine = engine

    def __call__(self, *args: Any, **keywords: Any) -> Tensor:  # noqa: ANN401
        """As of any list of them."""
        with self._engine.generation(running=False):
            return super().__call__(*args, **keywords)


class _Criteria(StoppingCriteriaList):
    """Those of a generation, see `_Processors`."""

    def __init__(self, criteria: list[Any], engine: Engine) -> None:
        super().__init__(criteria)
        self._engine = engine

    def __call__(self, *args: Any, **keywords: Any) -> Tensor:  # noqa: ANN401
        """As of any list of them."""
        with self._engine.generation(running=False):
            return super().__call__(*args, **keywords)


def is_attached(model: nn.Module) -> bool:
    """Whether a session is open on an (unwrapped) model."""
    return _NAME in model.__dict__


class Attachment:
    """What is on one model while sessions on it are open; the newest session is in force.

    Attributes:
        engines: those of the open sessions, the newest last.
    """

    def __init__(self, family: Family) -> None:
        self.engines: list[Engine] = []
        self._family = family
        self._attention = family.text_config._attn_implementation
        self._saved_config = getattr(family.config, "lookagain", _MISSING)
        self._home = id(family.model)
        self._methods: dict[str, Any] = {}
        self._handles: list[Any] = []

    @classmethod
    def enter(cls, family: Family, engine: Engine) -> Attachment:
        """Put `engine` in force on the model, and the hooks on it if it is the first."""
        attachment = family.model.__dict__.get(_NAME)
        _refuse_shared(family, attachment)
        if attachment is None:
            attachment = cls(family)
            attachment._install()
            setattr(family.model, _NAME, attachment)
        elif attachment._home != id(family.model):
            # The model is a copy, made while a session was open on the original.
            attachment._home = id(family.model)
            attachment.engines.clear()
        _IN_USE[id(family.text_config)] = attachment
        attachment.engines.append(engine)
        attachment._publish(engine.config)
        return attachment

    def leave(self, engine: Engine) -> None:
        """Take `engine` out of force; with the last one everything goes back as it was."""
        if engine not in self.engines:
            return
        self.engines.remove(engine)
        if self.engines:
            self._publish(self.engines[-1].config)
        else:
            self._restore()
            _IN_USE.pop(id(self._family.text_config), None)
            delattr(self._family.model, _NAME)
        _forget_compiled(self._family.model)

    def _install(self) -> None:
        model, base, decoder = self._family.model, self._family.base, self._family.decoder
        model.set_attn_implementation({"text_config": ATTENTION_NAME})
        self._hook(model.register_forward_pre_hook, self._before_model)
        self._hook(base.register_forward_pre_hook, self._before_base)
        self._hook(decoder.register_forward_pre_hook, self._before_decoder)
        self._handles.append(decoder.register_forward_hook(self._after_decoder))
        self._handles.append(base.register_forward_hook(self._after_base, always_call=True))
        self._handles.append(model.register_forward_hook(self._after_model, always_call=True))
        self._replace("_validate_generation_mode", self._check_mode)
        self._replace("_get_logits_processor", self._logits_processors)
        self._replace("_get_stopping_criteria", self._stopping_criteria)
        self._replace("generate", self._generate)
        self._replace("init_continuous_batching", _refuse_batching)
        _forget_compiled(model)

    def _check_mode(self, mode: GenerationMode, *args: Any, **keywords: Any) -> None:  # noqa: ANN401
        if mode not in _MODES:
            raise ValueError(
                f"generation mode {mode.value!r} is not supported under look_again: use "
                "greedy decoding or sampling (num_return_sequences is fine)"
            )
        self._original("_validate_generation_mode", mode, *args, **keywords)

    def _logits_processors(self, *args: Any, **keywords: Any) -> LogitsProcessorList:  # noqa: ANN401
        """Those of the generation, after one that forbids placeholders.

        Not through `generation_config`, whose `suppress_tokens` a call to generate replaces.
        """
        found = self._original("_get_logits_processor", *args, **keywords)
        engine = self.engines[-1]
        engine.begin_answer(keywords.get("input_ids_seq_length"))
        return _Processors([_Forbid(self._family.visual_token_ids()), *found], engine)

    def _stopping_criteria(self, *args: Any, **keywords: Any) -> StoppingCriteriaList:  # noqa: ANN401
        found = self._original("_get_stopping_criteria", *args, **keywords)
        return _Criteria(found, self.engines[-1])

    def _generate(self, *args: Any, **keywords: Any) -> Any:  # noqa: ANN401
        """As before; meanwhile the engine knows how long the prompt is."""
        with self.engines[-1].generation(running=True):
            return self._original("generate", *args, **keywords)

    def _replace(self, name: str, method: Callable[..., Any]) -> None:
        """Put a method on the model itself, in front of its class's."""
        self._methods[name] = self._family.model.__dict__.get(name, _MISSING)
        setattr(self._family.model, name, method)

    def _original(self, name: str, *args: Any, **keywords: Any) -> Any:  # noqa: ANN401
        """Call the method that stood there before."""
        model, method = self._family.model, self._methods[name]
        if method is _MISSING:
            return getattr(type(model), name)(model, *args, **keywords)
        return method(*args, **keywords)

    def _hook(self, register: Callable[..., Any], function: Callable[..., Any]) -> None:
        self._handles.append(register(function, with_kwargs=True))

    def _publish(self, config: LookAgainConfig) -> None:
        self._family.config.lookagain = config.to_dict()

    def _restore(self) -> None:
        model, config = self._family.model, self._family.config
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        release_attention(self._family.decoder)
        model.set_attn_implementation({"text_config": self._attention})
        for name, method in self._methods.items():
            if method is _MISSING:
                delattr(model, name)
            else:
                setattr(model, name, method)
        self._methods.clear()
        if self._saved_config is _MISSING:
            del config.lookagain
        else:
            config.lookagain = self._saved_config

    def _before_model(
        self, module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]
    ) -> None:
        self.engines[-1].note_labels(_by_name(module, args, keywords))

    def _before_base(
        self, module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        attention = self._family.decoder.config._attn_implementation
        if attention != ATTENTION_NAME:
            raise RuntimeError(
                f"the model's attention was set to {attention!r} within the session, which then "
                "cannot look again: detach() first, or set it back by model."
                f"set_attn_implementation({{'text_config': {ATTENTION_NAME!r}}})"
            )
        engine, keywords = self.engines[-1], _by_name(module, args, keywords)
        if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
            with lasting():
                return (), engine.before_base(keywords)
        return (), engine.before_base(keywords)

    def _before_decoder(
        self, module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            keep_attention(module, ATTENTION_NAME)
        return (), self.engines[-1].before_decoder(_by_name(module, args, keywords))

    def _after_decoder(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> Any:  # noqa: ANN401
        return self.engines[-1].after_decoder(output)

    def _after_model(self, *_: Any) -> None:  # noqa: ANN401
        """Also after an error before the base model was called."""
        self.engines[-1].forget_labels()

    def _after_base(self, *_: Any) -> None:  # noqa: ANN401
        """Also after an error: what was planned for the decoder is not for another call."""
        self.engines[-1].forget_plan()


def _refuse_shared(family: Family, own: Attachment | None) -> None:
    """Raise if another model's session switched the very config that this model reads."""
    other = _IN_USE.get(id(family.text_config))
    if other is None or other is own or other._family.text_config is not family.text_config:
        return
    if other.engines:
        raise ValueError(
            "model shares its config with another model that looks again, and both would read "
            "each other's settings: detach that session first, or give this model a config of its "
            "own (copy.deepcopy(config)) when it is made"
        )


def _refuse_batching(*_: Any, **__: Any) -> None:  # noqa: ANN401
    """Continuous batching shares one paged cache among sequences that come and go."""
    raise ValueError(
        "generate_batch (continuous batching) is not supported under look_again: use generate, "
        "with a batch of prompts padded on the left"
    )


def _by_name(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> dict[str, Any]:
    """All arguments as keywords of this version of transformers, in a dict of their own."""
    if args:
        names = [name for name in inspect.signature(module.forward).parameters if name != "self"]
        keywords = {**dict(zip(names, args, strict=False)), **keywords}
    else:
        keywords = dict(keywords)
    if CACHE != "past_key_values" and "past_key_values" in keywords:
        before = keywords.pop("past_key_values")
        keywords.setdefault(CACHE, before)
    return keywords


def _forget_compiled(model: nn.Module) -> None:
    """Drop a compiled forward: torch.compile does not notice that hooks came or went."""
    if "_compiled_call" in model.__dict__:
        del model._compiled_call
        torch.compiler.reset()
