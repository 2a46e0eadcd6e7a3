"""The trainers' metric `visual_attention`: from the step's own backward, and what a forward reads.

What it is compared with is a forward of its own, without gradients, over the same batch under the
same weights.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("trl", reason="needs the extra 'train'")
pytest.importorskip("peft", reason="needs the extra 'train'")

import test_training_brpo as brpo
import test_training_trl_sft as sft
from peft import LoraConfig

from lookagain_ext.generation import look_again

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
]
WAYS = {**brpo.WAYS, "append": {"strategy": "copy", "backend": "append"}}


@torch.no_grad()
def by_a_forward(trainer, inputs):
    """The share of the answers' attention on the picture, token by token."""
    names = ("pixel_values", "image_grid_thw", "mm_token_type_ids")
    given = {name: inputs[name] for name in names}
    if "completion_ids" in inputs:
        kinds = ("prompt", "completion")
        ids, mask = (torch.cat([inputs[f"{k}_{n}"] for k in kinds], 1) for n in ("ids", "mask"))
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, : inputs["prompt_ids"].shape[1]] = -100
    else:
        ids, mask, labels = (inputs[n] for n in ("input_ids", "attention_mask", "labels"))
    config = replace(trainer.look_again_config, track_attention=True)
    with look_again(trainer.model, config, trainer.processing_class) as session:
        trainer.model(**given, input_ids=ids, attention_mask=mask, labels=labels, use_cache=False)
        return float(session.trace.attention.sum() / (labels != -100).sum())


def spied(trainer):
    """What a forward reads of each batch that the trainer trains on, in order."""
    read, compute = [], trainer.compute_loss

    def spy(model, inputs, *args, **keywords):
        read.append(by_a_forward(trainer, inputs))
        return compute(model, inputs, *args, **keywords)

    trainer.compute_loss = spy
    return read


def logged(trainer):
    return [line["visual_attention"] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("checkpointing", [None, False, True])
@pytest.mark.parametrize("way", WAYS)
def test_brpo(way, checkpointing, tmp_path):
    """Three steps; the old policy and the reference, which TRL also asks, are not measured."""
    settings = {"max_steps": 3, "num_iterations": 2}
    if checkpointing is not None:
        settings["gradient_checkpointing"] = True
        settings["gradient_checkpointing_kwargs"] = {"use_reentrant": checkpointing}
    trainer, _ = brpo.make_trainer(tmp_path, WAYS[way], **settings)
    read = spied(trainer)
    trainer.train()
    assert logged(trainer) == pytest.approx(read, rel=1e-4) and len(read) == 3
    assert len(set(read)) == 3 and all(0 < share < 1 for share in read)
    brpo.assert_plain(trainer.model)


@pytest.mark.parametrize("checkpointing", [None, False, True])
@pytest.mark.parametrize("way", WAYS)
def test_sft(way, checkpointing, tmp_path):
    """Only the first batch of a step is measured."""
    settings = {"max_steps": 2, "gradient_accumulation_steps": 2, "max_grad_norm": 0.1}
    if checkpointing is not None:
        settings["gradient_checkpointing"] = True
        settings["gradient_checkpointing_kwargs"] = {"use_reentrant": checkpointing}
    trainer = sft.make_trainer(tmp_path, WAYS[way], **settings)
    read = spied(trainer)
    trainer.train()
    assert len(read) == 4
    assert logged(trainer) == pytest.approx(read[::2], rel=1e-4)


@pytest.mark.parametrize("trains", [["q_proj"], ["v_proj"], ["o_proj"]])
def test_layers_below_all_that_trains_do_not_count(trains, tmp_path):
    """With an adapter on the upper of two layers the lower one has no backward to count in."""
    lora = LoraConfig(r=4, target_modules=trains, layers_to_transform=[1])
    trainer = sft.make_trainer(tmp_path, max_steps=1, lora=lora, train_tags_only=False)
    read = spied(trainer)
    trainer.train()
    if trains == ["o_proj"]:  # behind the attention: nothing has a backward
        assert "visual_attention" not in trainer.state.log_history[0]
    else:
        assert 0 < logged(trainer)[0] < 1
        assert logged(trainer)[0] != pytest.approx(read[0], rel=1e-2)


@pytest.mark.parametrize("way", ["copy", "route", "off"])
def test_no_forward_more_and_none_measured_without_a_log(way, tmp_path):
    """Four steps, two logs: forwards of the decoder with the metric and without.

    With "off" other attention trains, and the metric takes a forward at each log.
    """
    counts, measured = [], []
    for wanted in (False, True):
        settings = {"max_steps": 4, "logging_steps": 2, "log_visual_attention": wanted}
        trainer = sft.make_trainer(tmp_path / str(wanted), WAYS[way], **settings)
        asked = []
        trainer.model.model.language_model.layers[0].register_forward_pre_hook(
            lambda _, __, keywords, asked=asked: asked.append("backward_probe" in keywords),
            with_kwargs=True,
        )
        trainer.train()
        counts.append(len(asked))
        measured.append(sum(asked))
        lines = [line for line in trainer.state.log_history if "loss" in line]
        assert [("visual_attention" in line) for line in lines] == [wanted] * 2
    more, within = (2, 0) if way == "off" else (0, 2)
    assert counts[1] == counts[0] + more and measured == [0, within]


@pytest.mark.parametrize("way", ["copy", "off"])
def test_the_step_is_the_same_step(way, tmp_path):
    """Counting changes no weight by a bit."""
    weights = []
    for wanted in (False, True):
        settings = {"log_visual_attention": wanted}
        trainer = sft.make_trainer(tmp_path / str(wanted), WAYS[way], **settings)
        trainer.train()
        weights.append([p.detach() for p in trainer.model.parameters()])
    for one, other in zip(*weights, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("way", ["off", {"strategy": "copy", "backend": "reencode"}], ids=str)
def test_a_forward_of_its_own_draws_no_random_numbers(way, tmp_path):
    """With dropout in the adapter the steps are those without the metric."""
    weights, modes = [], []
    for wanted in (False, True):
        lora = LoraConfig(r=4, lora_dropout=0.3, target_modules=["q_proj"])
        settings = {"log_visual_attention": wanted, "train_tags_only": False, "lora": lora}
        trainer = sft.make_trainer(tmp_path / str(wanted), way, **settings)
        trainer.train()
        modes.append([module.training for module in trainer.model.modules()])
        weights.append([p.detach() for p in trainer.model.parameters() if p.requires_grad])
    assert len(logged(trainer)) == 4 and modes[0] == modes[1]
    for one, other in zip(*weights, strict=True):
        assert torch.equal(one, other)


def test_a_model_with_attention_dropout_is_measured_without_it(tmp_path):
    trainer = sft.make_trainer(tmp_path, "off", max_steps=1)
    for layer in trainer.model.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.1
    trainer.train()
    assert 0 < logged(trainer)[0] < 1


def test_what_cannot_be_measured_is_left_out_with_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr("lookagain_ext.training.looking.look_again", _fail)
    trainer = sft.make_trainer(tmp_path, "off", max_steps=2)
    with pytest.warns(UserWarning, match="visual_attention is left out.*cut off") as told:
        trainer.train()
    assert trainer.state.global_step == 2
    assert sum("visual_attention" in str(one.message) for one in told) == 1
    assert not any("visual_attention" in line for line in trainer.state.log_history)


@pytest.mark.parametrize("way", ["copy", "off"])
def test_rows_without_a_picture_do_not_count(way, tmp_path):
    shares = []
    for rows in ([0], [0, 1]):
        trainer = sft.make_trainer(tmp_path / str(len(rows)), way, max_steps=1)
        data = [dict(trainer.train_dataset[row]) for row in rows]
        for row in data[1:]:
            row["images"] = []
        batch = trainer.data_collator(data)
        trainer.data_collator = lambda _, batch=batch: dict(batch)
        trainer.train()
        shares += logged(trainer)
    assert shares[1] == pytest.approx(shares[0], rel=1e-4)


def test_re_encoding_has_the_metric_of_virtual(tmp_path):
    way = {"strategy": "copy", "backend": "reencode"}
    trainer = sft.make_trainer(tmp_path, way, max_steps=1)
    twin = sft.make_trainer(tmp_path / "twin", {"strategy": "copy"}, max_steps=1)
    for each in (trainer, twin):
        each.train()
    assert logged(trainer) == pytest.approx(logged(twin), rel=1e-4)


@pytest.mark.parametrize("before", [True, False], ids=["before the forward", "after it"])
def test_a_run_that_fails_leaves_nothing_behind(before, tmp_path):
    """What a failed step had begun to measure is not that of the next run's batch."""
    trainer = sft.make_trainer(tmp_path, max_steps=1)
    with pytest.MonkeyPatch.context() as patch:
        if before:
            hook = trainer.model.model.register_forward_pre_hook(_fail, prepend=True)
        else:
            patch.setattr(trainer.accelerator, "backward", _fail)
        with pytest.raises(RuntimeError, match="cut off"):
            trainer.train()
        assert trainer._measuring is not None
        if before:
            hook.remove()
            trainer.log({"after": 1.0})  # as a callback might
            assert "visual_attention" not in trainer.state.log_history[-1]
    read = spied(trainer)
    for runs in (1, 2):
        trainer.train()
        assert len(read) == runs and logged(trainer) == pytest.approx(read[-1:], rel=1e-4)


def _fail(*_: object, **__: object) -> None:
    raise RuntimeError("cut off")


@pytest.mark.parametrize(
    ("settings", "measured"),
    [
        ({"logging_strategy": "no", "logging_steps": 1}, []),
        ({"logging_steps": 0.5}, [2, 4]),
        ({"logging_steps": 3, "logging_first_step": True}, [1, 3]),
    ],
    ids=str,
)
def test_only_logged_steps_are_measured(settings, measured, tmp_path):
    trainer = sft.make_trainer(tmp_path, max_steps=4, **settings)
    found, compute = [], trainer.compute_loss

    def spy(*args, **keywords):
        result = compute(*args, **keywords)
        if trainer._measuring is not None:
            found.append(trainer.state.global_step + 1)
        return result

    trainer.compute_loss = spy
    trainer.train()
    assert found == measured
    lines = [x["step"] for x in trainer.state.log_history if "visual_attention" in x]
    assert lines == measured
