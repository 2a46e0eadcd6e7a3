"""A tiny random model in a folder, drawn questions for TRL's trainers, and forced reflections."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList

from lookagain_ext.synthetic.processor import SceneProcessor
from lookagain_ext.synthetic.scenes import Scene
from lookagain_ext.synthetic.tiny import build_tiny

SIZES = {"text_hidden": 64, "text_layers": 2, "vision_hidden": 32, "vision_layers": 1}
ANSWER = (
    "<SUMMARY>a</SUMMARY><CAPTION>b</CAPTION><REASONING>c</REASONING>"
    "<REFLECTION>d</REFLECTION><CONCLUSION>2</CONCLUSION>"
)


def saved_model(folder: Path, tied: bool = True) -> tuple[Any, SceneProcessor]:
    """A random Qwen2.5-VL whose attention is far from uniform, loaded from `folder`."""
    model, processor = build_tiny(0, **SIZES)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    if not tied:
        for config in (model.config, model.config.text_config):
            config.tie_word_embeddings = False
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone().flip(0))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return type(model).from_pretrained(folder, dtype=torch.float32), processor


def questions(count: int, note: str = "") -> Any:  # noqa: ANN401 - datasets are optional
    """A dataset of `count` prompts of different lengths, each about a drawn scene."""
    from datasets import Dataset, Image, List

    rows = {
        "prompt": [
            [{"role": "user", "content": f"{note}How many red squares are there? " + "x " * i}]
            for i in range(count)
        ],
        "images": [[Scene.random(i).render(1)] for i in range(count)],
        "answer": [str(i) for i in range(count)],
    }
    return Dataset.from_dict(rows).cast_column("images", List(Image()))


def answered(count: int, note: str = "") -> Any:  # noqa: ANN401
    """`questions` with an answer that reflects once."""
    completion = [{"role": "assistant", "content": ANSWER}]
    return questions(count, note).add_column("completion", [completion] * count)


class _Script(LogitsProcessor):
    """Forces reflections at given steps of each row, and forbids all others and the end."""

    def __init__(self, steps: list[list[int]], token: int, banned: list[int]) -> None:
        self.steps, self.token, self.banned = steps, token, banned
        self.prompt: int | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.prompt is None:
            self.prompt = input_ids.shape[1]
        step, scores = input_ids.shape[1] - self.prompt, scores.clone()
        scores[:, self.banned] = -torch.inf
        for row, steps in enumerate(self.steps):
            if step in steps:
                scores[row] = -torch.inf
                scores[row, self.token] = 0.0
        return scores


class Recorder:
    """Makes a model's rollouts reflect at given steps, and keeps the logits of every step.

    Args:
        model: the model itself, without wrappers and without an open session.
        processor: its processor.
        steps: for each row of a generation, the steps at which it reflects.
    """

    def __init__(self, model: nn.Module, processor: Any, steps: list[list[int]]) -> None:  # noqa: ANN401
        ids = processor.tokenizer.convert_tokens_to_ids
        self.token = ids("<REFLECTION>")
        banned = [self.token, processor.tokenizer.eos_token_id, ids("<|endoftext|>")]
        self.logits: list[Tensor] = []
        self.generations = 0
        plain = model._get_logits_processor

        def processors(*args: Any, **keywords: Any) -> LogitsProcessorList:  # noqa: ANN401
            self.logits.clear()
            self.generations += 1
            script = _Script(steps, self.token, banned)
            return LogitsProcessorList([*plain(*args, **keywords), script])

        model._get_logits_processor = processors
        model.lm_head.register_forward_hook(self._keep)

    def _keep(self, _: nn.Module, __: Any, output: Tensor) -> None:  # noqa: ANN401
        self.logits.append(output[:, -1].detach().float())

    def log_probabilities(self, tokens: Tensor) -> Tensor:
        """float32 [B, T]: of the tokens of the latest rollout."""
        logits = torch.stack(self.logits[: tokens.shape[1]], dim=1)
        return logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
