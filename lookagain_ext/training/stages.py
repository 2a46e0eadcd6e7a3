"""The losses of the stages."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, Qwen2_5_VLForConditionalGeneration

from ..synthetic.processor import SceneProcessor
from .config import Stage
from .data import ATTRIBUTES, IGNORE, patchify, spelled


def visual_tokens(
    model: Qwen2_5_VLForConditionalGeneration, pixels: torch.Tensor, grid: torch.Tensor
) -> torch.Tensor:
    """Merged visual tokens of all pictures, [pictures * 36, hidden]."""
    found = model.model.get_image_features(pixels, grid)
    found = getattr(found, "pooler_output", found)
    return found if torch.is_tensor(found) else torch.cat(list(found))


def word_loss(
    model: Qwen2_5_VLForConditionalGeneration,
    tokens: torch.Tensor,
    cells: torch.Tensor,
    processor: SceneProcessor,
) -> tuple[torch.Tensor, float]:
    """How badly visual tokens match the embeddings of the words that are true of them.

    The classifier of an attribute is made of the decoder's own word embeddings, so that a picture
    and words about it lie in one space before the decoder is trained.

    Args:
        model: whose embeddings are matched, and trained with the vision tower.
        tokens: [N, hidden].
        cells: int64 [N, attributes], see :func:`~lookagain_ext.training.data.cell_labels`.
        processor: knows the words' ids.

    Returns:
        The sum over attributes of the cross-entropies, and the share of tokens with all right.
    """
    embedding = model.get_input_embeddings().weight
    tokens = model.model.language_model.norm(tokens)  # as before the output layer: angles count
    losses, right = [], []
    for words, targets in zip(ATTRIBUTES.values(), cells.unbind(-1), strict=True):
        rows = embedding[processor.tokenizer.convert_tokens_to_ids(spelled(words))]
        logits = (tokens @ rows.T).float()
        losses.append(nn.functional.cross_entropy(logits, targets))
        right.append(logits.argmax(-1) == targets)
    return torch.stack(losses).sum(), torch.stack(right).all(0).float().mean().item()


def looking_loss(attention: torch.Tensor, looks: torch.Tensor, first: int) -> torch.Tensor:
    """How little a layer looks at the cell that the next token is about.

    Half of the heads are asked to; the others stay free. Attention finds its way by itself too,
    in many times as many steps.

    Args:
        attention: [B, H, L, L], weights of one layer.
        looks: int64 [B, L], see :class:`~lookagain_ext.training.data.SceneBatches`.
        first: key index of the first visual token.

    Returns:
        The mean over positions of -log of the weight on that visual token.
    """
    heads = attention[:, : attention.shape[1] // 2].mean(1)
    rows, positions = (looks >= 0).nonzero(as_tuple=True)
    weight = heads[rows, positions, first + looks[rows, positions]]
    return -(weight.float() + 1e-6).log().mean()


def loss_of(
    model: Qwen2_5_VLForConditionalGeneration,
    batch: dict[str, torch.Tensor],
    processor: SceneProcessor,
) -> tuple[torch.Tensor, float]:
    """Loss of a batch, and the share of its targets that the model puts first.

    Args:
        model: in training mode.
        batch: made by :class:`~lookagain_ext.training.data.SceneBatches`.
        processor: cuts the pictures.
    """
    pixels = patchify(batch["pictures"], processor)
    side = processor.side // processor.image_processor.patch_size
    grid = torch.tensor([[1, side, side]] * len(batch["pictures"]))
    if "cells" in batch:
        tokens = visual_tokens(model, pixels, grid)
        return word_loss(model, tokens, batch["cells"].flatten(0, 1), processor)
    out = model(
        input_ids=batch["input_ids"],
        labels=batch["labels"],
        mm_token_type_ids=batch["mm_token_type_ids"],
        pixel_values=pixels,
        image_grid_thw=grid,
        use_cache=False,
        output_attentions="looks" in batch,
    )
    targets = batch["labels"][:, 1:]
    trained = targets != IGNORE
    right = out.logits[:, :-1].detach().argmax(-1)[trained] == targets[trained]
    loss = out.loss
    if "looks" in batch:
        first = int((batch["mm_token_type_ids"][0] != 0).int().argmax())
        # The first layer has to read what is asked, the last one to speak.
        layers = out.attentions[1:-1] or out.attentions
        looking = [looking_loss(layer, batch["looks"], first) for layer in layers]
        loss = loss + 0.3 * torch.stack(looking).mean()
    return loss, right.float().mean().item()


@contextlib.contextmanager
def looking_again(
    model: Qwen2_5_VLForConditionalGeneration, stage: Stage, tokenizer: PreTrainedTokenizerBase
) -> Iterator[None]:
    """The context in which the stage's forward passes run: visual re-injection, or nothing."""
    if stage.look_again == "off":
        yield
        return
    from ..generation import LookAgainConfig, look_again

    with look_again(model, LookAgainConfig(**look_again_entries(stage)), tokenizer):
        yield


def look_again_entries(stage: Stage) -> dict[str, str | float]:
    """What the stage's LookAgainConfig is made of."""
    return {"strategy": stage.look_again, "route_ratio": stage.route_ratio}
