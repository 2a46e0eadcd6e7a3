"""A Qwen2.5-VL processor that needs no torchvision: text and images in, model inputs out.

Any picture is accepted: it is flattened to RGB, put on a square of white and resized to the one
size that the model was trained on.
"""

from __future__ import annotations

import bisect
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import BatchFeature, PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.processing_utils import ProcessorMixin

CONFIG_NAME = "preprocessor_config.json"
_WHITE = (255, 255, 255)


def to_rgb(image: Image.Image) -> Image.Image:
    """``image`` as 8-bit RGB: transparency over white, 16-bit and float levels scaled to 8 bits."""
    if not isinstance(image, Image.Image):
        raise ValueError(f"image must be a PIL image, got {type(image).__name__}")
    if min(image.size) < 1:
        raise ValueError(f"image must not be empty, got {image.width}x{image.height} pixels")
    if image.mode.startswith("I") or image.mode == "F":
        levels = np.asarray(image, dtype=np.float64)
        top = 65535.0 if levels.max(initial=0.0) > 255.0 else 255.0
        top = 1.0 if image.mode == "F" and levels.max(initial=0.0) <= 1.0 else top
        image = Image.fromarray((np.clip(levels / top, 0, 1) * 255).round().astype(np.uint8))
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, (*_WHITE, 255))
        image = Image.alpha_composite(paper, image)
    return image.convert("RGB")


def letterbox(image: Image.Image, side: int) -> Image.Image:
    """``image`` as RGB, ``side`` x ``side`` pixels: scaled to fit and centred on white."""
    image = to_rgb(image)
    scale = side / max(image.size)
    size = tuple(max(1, round(length * scale)) for length in image.size)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    if size == (side, side):
        return image
    square = Image.new("RGB", (side, side), _WHITE)
    square.paste(image, ((side - size[0]) // 2, (side - size[1]) // 2))
    return square


class SceneProcessor(ProcessorMixin):
    """Processor of the tiny model; called and used as Qwen2.5-VL's own, without video."""

    image_processor_class = "AutoImageProcessor"
    tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        image_processor: Qwen2VLImageProcessorPil,
        tokenizer: PreTrainedTokenizerFast,
        chat_template: str | None = None,
        side: int = 168,
        **kwargs: Any,  # noqa: ANN401 - whatever transformers stores beside the parts
    ) -> None:
        """Put the parts together.

        Args:
            image_processor: cuts a picture into patches.
            tokenizer: with an ``image_token``.
            chat_template: None takes the tokenizer's.
            side: pixels of a side of every picture given to the model.
            **kwargs: ignored.

        Raises:
            ValueError: a side that is no whole number of merged patches.
        """
        block = image_processor.patch_size * image_processor.merge_size
        if side < block or side % block:
            raise ValueError(f"side must be a positive multiple of {block} pixels, got {side}")
        self.image_processor = image_processor
        self.tokenizer = tokenizer
        self.chat_template = chat_template or tokenizer.chat_template
        self.side = side
        self.image_token = tokenizer.image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.visual_tokens = (side // block) ** 2

    @property
    def model_input_names(self) -> list[str]:
        """Names of what a call returns."""
        text = ["input_ids", "attention_mask", "mm_token_type_ids"]
        return [*text, "pixel_values", "image_grid_thw"]

    def patches(self, image: Image.Image) -> np.ndarray:
        """float32 [patches, 3 * temporal_patch * patch * patch] of one picture."""
        picture = letterbox(image, self.side)
        done = self.image_processor(images=[picture], do_resize=False, return_tensors="np")
        return np.asarray(done["pixel_values"], dtype=np.float32)

    def __call__(
        self,
        images: Image.Image | Sequence[Any] | None = None,
        text: str | Sequence[str] | None = None,
        return_tensors: str | None = "pt",
        padding: bool | str = True,
        **kwargs: Any,  # noqa: ANN401 - passed to the tokenizer
    ) -> BatchFeature:
        """Encode texts in which each ``<|image_pad|>`` stands for one picture.

        Args:
            images: one picture, a list of them, or a list of lists (one per text).
            text: one text or a list of them.
            return_tensors: "pt", "np" or None.
            padding: as in the tokenizer.
            **kwargs: passed to the tokenizer.

        Returns:
            ``input_ids``, ``attention_mask``, ``mm_token_type_ids`` (1 on picture tokens), each
            int64 [B, L]; with pictures also ``pixel_values`` float32 [all patches, patch size]
            and ``image_grid_thw`` int64 [pictures, 3]. With ``return_offsets_mapping``,
            ``offset_mapping`` [B, L, 2] has the places of the tokens in the texts as they were
            given, where a picture is one ``<|image_pad|>``.

        Raises:
            ValueError: no text, something that is not a picture, or as many pictures as places
                for them do not come.
        """
        if text is None:
            raise ValueError("text must be a string or a list of strings, got None")
        texts = [text] if isinstance(text, str) else list(text)
        pictures = _flatten(images)
        places = sum(one.count(self.image_token) for one in texts)
        if places != len(pictures):
            raise ValueError(
                f"text must hold one {self.image_token} for each picture, "
                f"got {places} for {len(pictures)} pictures"
            )
        given = texts
        texts = [
            one.replace(self.image_token, self.image_token * self.visual_tokens) for one in texts
        ]
        # The last one asks where pictures were put in: offset_mapping does without it.
        ignored = ("return_mm_token_type_ids", "text_kwargs", "images_kwargs", "videos")
        for name in (*ignored, "return_text_replacement_offsets"):
            kwargs.pop(name, None)
        data = dict(self.tokenizer(texts, padding=padding, **kwargs))
        if "offset_mapping" in data:
            data["offset_mapping"] = list(map(self._as_given, given, data["offset_mapping"]))
        is_image = [[int(i == self.image_token_id) for i in row] for row in data["input_ids"]]
        data["mm_token_type_ids"] = is_image
        if pictures:
            grid = self.side // self.image_processor.patch_size
            data["pixel_values"] = np.concatenate([self.patches(one) for one in pictures])
            data["image_grid_thw"] = np.array([[1, grid, grid]] * len(pictures), dtype=np.int64)
        return BatchFeature(data, tensor_type=return_tensors)

    def _as_given(self, text: str, offsets: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Places in a text with pictures put in, as places in the ``text`` as it was given.

        From these transformers tells which tokens are the assistant's.
        """
        length, more = len(self.image_token), len(self.image_token) * (self.visual_tokens - 1)
        starts = [found.start() for found in re.finditer(re.escape(self.image_token), text)]
        expanded = [start + number * more for number, start in enumerate(starts)]
        places = []
        for begin, end in offsets:
            before = bisect.bisect_right(expanded, begin)
            shift = before * more
            if before and begin < expanded[before - 1] + length + more:
                begin, end = starts[before - 1] + shift, starts[before - 1] + shift + length
            places.append((begin - shift, end - shift))
        return places

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - as its own
        """As every processor's: tokens come unpadded and as lists unless asked otherwise.

        Calling the processor itself pads and makes tensors, which trainers that pad batches
        themselves do not expect of a chat template.
        """
        if kwargs.get("tokenize"):
            plain = {"padding": False, "return_tensors": None}
            plain = {name: value for name, value in plain.items() if name not in kwargs}
            kwargs["processor_kwargs"] = {**plain, **(kwargs.get("processor_kwargs") or {})}
        return super().apply_chat_template(*args, **kwargs)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> list[str]:  # noqa: ANN401
        """Write the tokenizer and ``preprocessor_config.json``; returns the files' names."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        files = list(self.tokenizer.save_pretrained(folder))
        config = {
            "processor_class": "SceneProcessor",
            "image_processor_type": "Qwen2VLImageProcessorPil",
            "side": self.side,
            "patch_size": self.image_processor.patch_size,
            "merge_size": self.image_processor.merge_size,
            "temporal_patch_size": self.image_processor.temporal_patch_size,
            "image_mean": list(self.image_processor.image_mean),
            "image_std": list(self.image_processor.image_std),
        }
        path = folder / CONFIG_NAME
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        return [*files, str(path)]

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        **kwargs: Any,  # noqa: ANN401 - the signature of transformers
    ) -> SceneProcessor:
        """Read what :meth:`save_pretrained` wrote.

        Raises:
            ValueError: the folder holds no processor of this class.
        """
        folder = Path(pretrained_model_name_or_path)
        if not is_scene_processor(folder):
            raise ValueError(f"{folder} holds no {CONFIG_NAME} of a SceneProcessor")
        config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        names = ("patch_size", "merge_size", "temporal_patch_size", "image_mean", "image_std")
        parts = Qwen2VLImageProcessorPil(**{name: config[name] for name in names})
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder))
        return cls(parts, tokenizer, side=config["side"])


def is_scene_processor(folder: str | Path) -> bool:
    """Whether ``folder`` holds a processor written by :class:`SceneProcessor`."""
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        return False
    return json.loads(path.read_text(encoding="utf-8")).get("processor_class") == "SceneProcessor"


def _flatten(images: Image.Image | Sequence[Any] | None) -> list[Image.Image]:
    """One list of pictures from one, many, or many per text."""
    if images is None:
        return []
    if isinstance(images, Image.Image):
        return [images]
    if not isinstance(images, list | tuple):
        raise ValueError(f"images must be PIL images, got {type(images).__name__}")
    return [picture for part in images for picture in _flatten(part)]
