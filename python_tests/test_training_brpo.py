"""BRPO on TRL: what a rollout saw is what the loss sees."""

from __future__ import annotations

import gc
import json
import math
import time
import warnings

import pytest
import torch

pytest.importorskip("trl", reason="needs the extra 'train'")
pytest.importorskip("peft", reason="needs the extra 'train'")

from peft import LoraConfig
from tiny_training import Recorder, questions, saved_model

from lookagain_ext.training.brpo import BRPOConfig, BRPOTrainer

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
]
STEPS = [[], [3], [1, 5], [2, 4, 8], [1, 3, 5, 7], [0, 9], [6], [10]]
WAYS = {
    "copy": "copy",
    "route": {"strategy": "route", "route_ratio": 0.3},
    "route-layer": {"strategy": "route", "route_ratio": 0.3, "route_scope": "layer"},
    "off": "off",
}
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}


def length_reward(completion_ids, **_):
    """Different for every answer, so that advantages are not 0."""
    return [float(sum(ids) % 97) for ids in completion_ids]


def make_trainer(folder, way="copy", lora=False, note="", tied=True, steps=STEPS, **settings):
    model, processor = saved_model(folder / "model", tied)
    recorder = Recorder(model, processor, steps)
    settings = {
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 12,
        "max_steps": 1,
        "learning_rate": 1e-3,
        "warmup_steps": 0,
        "logging_steps": 1,
        "bf16": False,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        **settings,
    }
    trainer = BRPOTrainer(
        model,
        [length_reward],
        BRPOConfig(str(folder / "out"), look_again=way, **settings),
        train_dataset=questions(2, note),
        processing_class=processor,
        peft_config=LoraConfig(task_type=lora or None, **LORA) if lora is not False else None,
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # what train() sets
    return trainer, recorder


def sampled(trainer):
    """A batch as the trainer samples it: two prompts, four answers each."""
    rows = [dict(row) for row in trainer.train_dataset for _ in range(4)]
    for row in rows:
        row["image"] = None
        del row["image"]
    return trainer._generate_and_score_completions(rows)


def recomputed(trainer, batch, model=None):
    names = ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")
    found, _, _ = trainer._get_per_token_logps_and_entropies(
        model or trainer.model,
        torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
        torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
        batch["completion_ids"].shape[1],
        **{name: batch[name] for name in names},
    )
    return found


def check_agreement(trainer, recorder, way):
    with trainer.looking() as sessions:
        batch = sampled(trainer)
        tokens = batch["completion_ids"]
        assert [row.count(recorder.token) for row in tokens.tolist()] == list(map(len, STEPS))
        if sessions and trainer.ref_model is None and trainer.beta == 0:
            rollout = sessions[0].trace
            assert [len(row) for row in rollout.reflections] == list(map(len, STEPS))
        trained = recomputed(trainer, batch)
        assert trained.requires_grad
        if sessions and trainer.beta == 0 and way != "route-layer":
            again = sessions[0].trace
            for before, after in zip(rollout.reflections, again.reflections, strict=True):
                assert [r.shown.tolist() for r in before] == [r.shown.tolist() for r in after]
    difference = (recorder.log_probabilities(tokens) - trained).abs().max()
    assert difference < 1e-5
    return batch, trained


@pytest.mark.parametrize("way", WAYS)
def test_loss_sees_what_the_rollout_saw(way, tmp_path):
    trainer, recorder = make_trainer(tmp_path, WAYS[way], beta=0.0)
    batch, trained = check_agreement(trainer, recorder, way)
    blind = recomputed(trainer, batch)  # without a session: text-only reflections
    far = (blind - trained).abs().amax(1) > 1e-3
    assert far.tolist() == [way != "off" and bool(steps) for steps in STEPS]
    assert torch.equal(blind[0], trained[0]) or (blind[0] - trained[0]).abs().max() < 1e-5


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
@pytest.mark.parametrize("way", ["copy", "route"])
def test_with_peft(way, task, tmp_path):
    """The policy with its adapter agrees with the rollout; the reference is the bare model."""
    note = "Write <REFLECTION></REFLECTION> once. "
    trainer, recorder = make_trainer(tmp_path, WAYS[way], lora=task, note=note, beta=0.1)
    batch, trained = check_agreement(trainer, recorder, way)
    assert trainer.ref_model is None
    with trainer.looking(), trainer.model.disable_adapter(), torch.no_grad():
        bare = recomputed(trainer, batch)
    torch.testing.assert_close(batch["ref_per_token_logps"], bare, rtol=0, atol=1e-6)
    assert (bare - trained).abs().max() > 1e-2


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("way", ["copy", "route"])
def test_with_gradient_checkpointing(way, reentrant, tmp_path):
    gradients = []
    for checkpointing in (False, True):
        trainer, recorder = make_trainer(
            tmp_path / str(checkpointing),
            WAYS[way],
            beta=0.0,
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant},
        )
        if checkpointing:
            trainer.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            trainer.model.enable_input_require_grads()
        torch.manual_seed(5)
        _, trained = check_agreement(trainer, recorder, way)
        trained.sum().backward()  # after the session: recomputed as it was computed
        gradients.append({n: p.grad for n, p in trainer.model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("reentrant", [False, True])
def test_training_with_gradient_checkpointing(reentrant, tmp_path):
    """The same step as without, through the whole trainer."""
    weights = []
    for checkpointing in (False, True):
        trainer, _ = make_trainer(
            tmp_path / str(checkpointing),
            "copy",
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant},
            optim="sgd",
        )
        ran = []
        trainer.model.model.language_model.layers[0].register_forward_hook(
            lambda module, *_, ran=ran: ran.append(module.gradient_checkpointing)
        )
        trainer.train()
        assert any(ran) == checkpointing
        weights.append([p.detach() for p in trainer.model.parameters()])
    for one, other in zip(*weights, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-6)


def test_order_of_the_data_depends_on_the_epoch_alone(tmp_path):
    trainer, _ = make_trainer(tmp_path)
    sampler = trainer._get_train_sampler(list(range(20)))
    orders = []
    for epoch in (0, 1, 2, 1):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[1] == orders[3] and orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize("lora", [False, None])
@pytest.mark.parametrize("way", WAYS)
def test_reference_model_is_the_policy_at_first(way, lora, tmp_path, monkeypatch):
    trainer, recorder = make_trainer(tmp_path, WAYS[way], lora=False)
    if lora is None:
        monkeypatch.setitem(LORA, "init_lora_weights", True)
        trainer, recorder = make_trainer(tmp_path / "lora", WAYS[way], lora=None)
    assert (trainer.ref_model is None) == (lora is None) and trainer.beta == 0.1
    batch, trained = check_agreement(trainer, recorder, way)
    difference = batch["ref_per_token_logps"] - trained
    assert difference.abs().max() < 1e-5
    with trainer.looking():
        trainer.compute_loss(trainer.model, batch)
    assert abs(trainer._metrics["train"]["kl"][-1]) < 1e-6


@pytest.mark.parametrize("way", ["copy", "off"])
def test_old_log_probabilities_are_the_rollouts(way, tmp_path):
    """Two updates on one rollout: TRL then computes the old policy's log-probabilities first."""
    trainer, recorder = make_trainer(tmp_path, WAYS[way], num_iterations=2, beta=0.0)
    with trainer.looking():
        batch = sampled(trainer)
    rollout = recorder.log_probabilities(batch["completion_ids"])
    assert (batch["old_per_token_logps"] - rollout).abs().max() < 1e-5


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("way", ["copy", "route", "off"])
def test_one_step_moves_every_parameter(way, tied, tmp_path):
    trainer, recorder = make_trainer(tmp_path, WAYS[way], tied=tied)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    forward, attention = trainer.model.model.forward, trainer.model.config.text_config
    trainer.train()
    assert recorder.generations == 1 and trainer.state.global_step == 1
    for name, parameter in trainer.model.named_parameters():
        if name.endswith("k_proj.bias"):
            continue  # adds the same to all logits of a query, but for the rotation
        assert not torch.equal(parameter, before[name]), f"{name} did not move"
    line = trainer.state.log_history[0]
    assert math.isfinite(line["loss"]) and abs(line["kl"]) < 1e-6
    assert line["reflections/count"] == sum(map(len, STEPS)) / 8
    assert line["reflections/answers"] == 7 / 8 and line["reflections/length"] > 0
    assert "rewards/length_reward/mean" in line
    assert_plain(trainer.model)
    assert_plain(trainer.ref_model)
    assert trainer.model.model.forward == forward and attention._attn_implementation == "sdpa"


def assert_plain(model):
    """Nothing of a session is left on the model."""
    assert model.config.text_config._attn_implementation == "sdpa"
    assert "_lookagain" not in model.__dict__ and not hasattr(model.config, "lookagain")
    for module in (model, model.model, model.model.language_model):
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        assert not [hook for hook in hooks if "lookagain" in type(hook.__self__).__module__]


def test_detached_when_training_raises(tmp_path):
    trainer, _ = make_trainer(tmp_path)
    trainer.reward_funcs[0] = lambda **_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert trainer.look_again_sessions == ()
    assert_plain(trainer.model)
    assert_plain(trainer.ref_model)


def test_checkpoint_says_how_the_model_looks_and_resumes(tmp_path):
    trainer, recorder = make_trainer(
        tmp_path, "copy", max_steps=2, save_strategy="steps", save_steps=1
    )
    trainer.train()
    straight = [p.detach().clone() for p in trainer.model.parameters()]
    saved = json.loads((tmp_path / "out/checkpoint-1/config.json").read_text())
    assert saved["lookagain"]["strategy"] == "copy"
    assert saved["lookagain"]["reflection_token_id"] == recorder.token
    assert "lookagain" != saved["text_config"].get("_attn_implementation")
    trainer.save_model(str(tmp_path / "final"))
    assert "lookagain" in json.loads((tmp_path / "final/config.json").read_text())
    assert_plain(trainer.model)
    del trainer
    gc.collect()
    again, _ = make_trainer(tmp_path, "copy", max_steps=2, save_strategy="no")
    again.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-1"))
    for one, other in zip(straight, again.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_seconds_and_tokens_are_of_training_alone_in_every_run(tmp_path):
    """Evaluations between the steps are a hundred times as long as the steps, and count nowhere."""
    settings = {"max_steps": 2, "eval_steps": 1, "beta": 0.0}
    trainer, _ = make_trainer(tmp_path, "copy", per_device_eval_batch_size=8, **settings)
    trainer.eval_dataset, trainer.args.eval_strategy = trainer.train_dataset, "steps"
    plain, begun = trainer._calculate_rewards, []

    def slow(*args):
        if not trainer.model.training:
            begun.append(1)
            time.sleep(3)
        return plain(*args)

    trainer._calculate_rewards = slow
    for _ in range(2):
        trainer.train()
        lines = [line for line in trainer.state.log_history if "loss" in line]
        assert len(lines) == 2
        for line in lines:
            parts = [line[f"seconds/{part}"] for part in ("rollout", "scoring", "training")]
            assert 0 < min(parts) and sum(parts) < 3
            assert sum(parts) == pytest.approx(line["step_time"], rel=0.1)
        between = lines[1]["num_tokens"] - lines[0]["num_tokens"]
        assert "tokens_per_second" not in lines[0]
        assert lines[1]["tokens_per_second"] == pytest.approx(between / sum(parts), rel=0.4)
        evaluated = [line for line in trainer.state.log_history if "eval_reward" in line]
        assert not any("seconds/" in name for line in evaluated for name in line)
    assert len(begun) >= 4


@pytest.mark.parametrize("changed", [False, True])
def test_a_reference_that_is_not_the_model_is_told(changed, tmp_path):
    """TRL loads it from where the model came from."""
    model, processor = saved_model(tmp_path / "model")
    if changed:
        with torch.no_grad():
            model.model.language_model.layers[1].mlp.up_proj.weight[3] += 0.5
    args = BRPOConfig(str(tmp_path / "out"), bf16=False, use_cpu=True, report_to=[])
    keywords = {"train_dataset": questions(2), "processing_class": processor}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        BRPOTrainer(model, [length_reward], args, **keywords)
    found = [str(one.message) for one in told if "the reference model is" in str(one.message)]
    assert len(found) == changed and all("layers.1.mlp.up_proj.weight" in one for one in found)
