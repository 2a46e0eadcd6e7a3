"""Models are loaded by name or folder, and answer about a picture without torchvision."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from tiny_models import FAMILIES, tiny_model
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from lookagain_ext.generation import LookAgainConfig, look_again
from lookagain_ext.models.loading import load
from lookagain_ext.synthetic.tokenizer import build_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


def saved(family, folder):
    """A random model of the family with the files that its hub repository would hold."""
    tokenizer = build_tokenizer()
    model = tiny_model(family, torch.float32, vocabulary=len(tokenizer))
    ids = tokenizer.convert_tokens_to_ids
    model.config.image_token_id = ids("<|image_pad|>")
    model.config.video_token_id = ids("<|video_pad|>")
    model.config.vision_start_token_id = ids("<|vision_start|>")
    model.config.vision_end_token_id = ids("<|vision_end|>")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    sizes = {"min_pixels": 64, "max_pixels": 1024}
    Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, **sizes).save_pretrained(folder)
    return model, tokenizer


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_answers_about_a_picture(family, tmp_path):
    expected, tokenizer = saved(family, tmp_path)
    model, processor = load(tmp_path)
    for name, parameter in expected.named_parameters():
        assert torch.equal(parameter, dict(model.named_parameters())[name])
    picture = Image.effect_noise((32, 24), 80).convert("RGB")
    text = "<|vision_start|><|image_pad|><|vision_end|>what is this"
    inputs = processor(images=[picture], text=[text], return_tensors="pt")
    assert inputs["mm_token_type_ids"].sum() == 12
    with look_again(model, LookAgainConfig(), processor) as session:
        assert session.config.reflection_token_id == tokenizer.get_vocab()["<REFLECTION>"]
        out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert out.shape[1] > inputs["input_ids"].shape[1]
        assert session.trace.grids == [[(1, 3, 4)]]


def test_a_chat_template_is_applied(tmp_path):
    saved("qwen2_5_vl", tmp_path)
    _, processor = load(tmp_path)
    picture = Image.effect_noise((16, 16), 80).convert("RGB")
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "what is this"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 4]]
    assert inputs["mm_token_type_ids"].sum() == 4


@pytest.mark.parametrize("dtype", [None, torch.float64, "bfloat16"])
def test_dtype(dtype, tmp_path):
    saved("qwen2_5_vl", tmp_path)
    model, _ = load(tmp_path, dtype=dtype, device="cpu")
    wanted = {None: torch.float32, torch.float64: torch.float64, "bfloat16": torch.bfloat16}
    assert model.dtype == wanted[dtype] and not model.training


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./no/such/folder", "there is no folder './no/such/folder'"),
        ("nothing", "there is no folder 'nothing'"),
        (__file__, "is a file: give the folder"),
    ],
)
def test_refuses(name, message):
    with pytest.raises(ValueError, match=message) as error:
        load(name)
    assert "\n" not in str(error.value)


def test_refuses_empty_folders_and_text_models(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(ValueError, match="'qwen2' and is a text-only model"):
        load(tmp_path)
