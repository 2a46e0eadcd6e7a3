"""The 7B's configurations start on its shape, cut to two layers: LOOKAGAIN_LARGE_TESTS=1 pytest …

Random weights, about 8 GB of memory and some minutes. Its tokenizer is not at hand, so the
vocabulary is that of the drawn scenes; everything else has the 7B's sizes.
"""

from __future__ import annotations

import os

import pytest
import torch

if not os.environ.get("LOOKAGAIN_LARGE_TESTS"):
    pytest.skip("set LOOKAGAIN_LARGE_TESTS to run it", allow_module_level=True)
pytest.importorskip("trl", reason="needs the extra 'train'")

from transformers import Qwen2_5_VLForConditionalGeneration

from lookagain_ext.synthetic.tiny import build_processor, tiny_config
from lookagain_ext.training.run_config import RunConfig
from lookagain_ext.training.trl_run import make_trainer

pytestmark = [
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
]
TEXT = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "num_hidden_layers": 2,
    "layer_types": ["full_attention"] * 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    "tie_word_embeddings": False,
}
VISION = {
    "depth": 2,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "out_hidden_size": 3584,
    "window_size": 112,
    "fullatt_block_indexes": [1],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path, processor = tmp_path_factory.mktemp("large"), build_processor()
    config = tiny_config(processor.tokenizer)
    for part, values in ((config.text_config, TEXT), (config.vision_config, VISION)):
        for name, value in values.items():
            setattr(part, name, value)
    config.tie_word_embeddings = False
    config.save_pretrained(path)
    config = type(config).from_pretrained(path)
    torch.manual_seed(0)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = Qwen2_5_VLForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(previous)
    assert model.model.language_model.layers[0].mlp.up_proj.weight.shape == (18944, 3584)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


@pytest.mark.parametrize("name", ["sft", "sft-lora", "coldstart", "brpo", "brpo-lora"])
def test_it_starts(name, folder, tmp_path):
    """One optimizer step, by the file's own settings but for sizes and the device."""
    plan = RunConfig.load(f"configs/qwen2.5-vl-7b/{name}.yaml").to_dict()
    kind = "brpo" if "brpo" in name else "sft"
    here = {"bf16": False, "use_cpu": True, "max_steps": 1, "report_to": [], "logging_steps": 1}
    here |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    here |= {"save_strategy": "no", "warmup_steps": 0}
    if kind == "brpo":
        here |= {"per_device_train_batch_size": 2, "num_generations": 2, "optim": "sgd"}
        here |= {"max_completion_length": 4}
    plan |= {"output": str(tmp_path), "model": str(folder), "dtype": "float32", "writer": None}
    plan |= {"data": {"scenes": 2}, "trainer": {**plan["trainer"], **here}}
    rewards = [lambda completion_ids, **_: [float(i) for i in range(len(completion_ids))]]
    trainer = make_trainer(kind, RunConfig.from_dict(plan), rewards)
    named = dict(trainer.model.named_parameters())
    before = {n: p.detach().clone() for n, p in named.items() if p.requires_grad and p.dim() == 1}
    before |= {n: p.detach().clone() for n, p in named.items() if "trainable_tokens" in n}
    trainer.train()
    line = next(line for line in trainer.state.log_history if "loss" in line)
    assert line["grad_norm"] > 0 and 0 < line["visual_attention"] < 1
    moved = [n for n, old in before.items() if not torch.equal(old, named[n])]
    if name == "sft-lora":
        assert any("embed_tokens" in n for n in before) and any("lm_head" in n for n in before)
        assert len(moved) == len(before), "the tags' rows of embedding and head train"
    elif kind == "sft":  # BRPO's step of 1e-6 is below what float32 sees of a weight of 1
        assert any("norm" in n for n in moved)
