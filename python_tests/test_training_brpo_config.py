"""BRPO's settings: the paper's defaults, the forms of the flag, what is refused."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("trl", reason="needs the extra 'train'")

from lookagain_ext import LookAgainConfig
from lookagain_ext.training.brpo import BRPOConfig, BRPOTrainer, reflection_lengths

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def test_defaults_are_the_papers():
    config = BRPOConfig("out", bf16=False, per_device_train_batch_size=8, use_cpu=True)
    assert (config.num_generations, config.temperature, config.beta) == (8, 1.0, 0.1)
    assert (config.learning_rate, config.max_completion_length) == (1e-6, 1024)
    assert (config.adam_beta1, config.adam_beta2, config.adam_epsilon) == (0.9, 0.95, 1e-8)
    assert config.get_warmup_steps(1000) == 10
    assert (config.loss_type, config.use_bias_correction_kl) == ("grpo", False)
    assert config.look_again["strategy"] == "off"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"look_again": "copy", "use_vllm": True}, "use_vllm=True does not work with look_again"),
        ({"look_again": "paste"}, "look_again must be one of 'copy', 'route', 'off'"),
        ({"look_again": {"strategie": "copy"}}, "unknown LookAgainConfig entries: strategie"),
        ({"look_again": {"keep": "latest"}}, "keep='latest' cannot be trained"),
    ],
)
def test_what_cannot_be_is_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        BRPOConfig("out", bf16=False, use_cpu=True, **settings)


def test_forms_of_the_flag():
    kept = LookAgainConfig(strategy="route", route_ratio=0.25).to_dict()
    forms = [LookAgainConfig.from_dict(kept), kept, json.dumps(kept)]
    for form in forms:
        config = BRPOConfig("out", bf16=False, use_cpu=True, look_again=form)
        assert config.look_again == kept and config.look_again_config == forms[0]
        assert json.loads(config.to_json_string())["look_again"] == kept
    with pytest.raises(TypeError, match="put off in quotes"):
        BRPOConfig("out", bf16=False, use_cpu=True, look_again=False)


def test_tools_are_refused_by_name(tmp_path):
    config = BRPOConfig(str(tmp_path), bf16=False, use_cpu=True, look_again="copy")
    with pytest.raises(ValueError, match="tools does not work with look_again='copy'"):
        BRPOTrainer("nowhere", [len], config, tools=[len])


def test_reflection_lengths_by_hand():
    assert reflection_lengths([5, 1, 7, 8, 2, 9], 1, 2) == [2]
    assert reflection_lengths([1, 2, 1, 7], 1, 2) == [0, 1]
    assert reflection_lengths([1, 7, 1, 8, 8, 2, 9, 2], 1, 2) == [1, 2]
    assert reflection_lengths([3, 2], 1, 2) == []
