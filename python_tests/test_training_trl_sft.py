"""SFT on TRL: what trains, what carries loss, and what is refused."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("trl", reason="needs the extra 'train'")

from tiny_training import ANSWER, answered, saved_model

from lookagain_ext.template import TAGS
from lookagain_ext.training.trainable import tag_ids, train_only_rows
from lookagain_ext.training.trl_sft import LookAgainSFTConfig, LookAgainSFTTrainer

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
]
WAYS = {"copy": "copy", "route": {"strategy": "route", "route_ratio": 0.3}, "off": "off"}


def make_trainer(folder, way="copy", tied=True, note="", lora=None, **settings):
    model, processor = saved_model(folder / "model", tied)
    settings = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
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
    return LookAgainSFTTrainer(
        model,
        LookAgainSFTConfig(str(folder / "out"), look_again=way, **settings),
        train_dataset=answered(4, note),
        processing_class=processor,
        peft_config=lora,
    )


def snapshot(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd"])
@pytest.mark.parametrize("tied", [True, False])
def test_only_the_tags_rows_train(tied, optim, tmp_path):
    settings = {"optim": optim, "gradient_accumulation_steps": 2}
    settings["gradient_checkpointing"] = optim == "sgd"
    trainer = make_trainer(tmp_path, tied=tied, **settings)
    model, rows = trainer.model, tag_ids(trainer.processing_class)
    before = snapshot(model)
    trainer.train()
    assert trainer.state.global_step == 4
    table = model.get_input_embeddings().weight
    assert (table is model.lm_head.weight) == tied
    others = torch.ones(table.shape[0], dtype=torch.bool)
    others[rows] = False
    for name, parameter in model.named_parameters():
        if parameter is table or parameter is model.lm_head.weight:
            assert torch.equal(parameter[others], before[name][others])
            moved = (parameter[rows] != before[name][rows]).any(1)
            assert moved.all(), f"rows {moved.tolist()} of {name}"
        elif ".visual." in name:
            assert torch.equal(parameter, before[name]) and parameter.grad is None
        elif not name.endswith("k_proj.bias"):
            assert not torch.equal(parameter, before[name]), f"{name} did not move"


def test_other_rows_keep_their_bits_across_a_resume(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=2)
    before = snapshot(trainer.model)
    trainer.train()
    straight = snapshot(trainer.model)
    again = make_trainer(tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-2"))
    for name, parameter in again.model.named_parameters():
        torch.testing.assert_close(parameter, straight[name], rtol=0, atol=1e-6)
    rows = tag_ids(trainer.processing_class)
    others = torch.ones(again.model.lm_head.weight.shape[0], dtype=torch.bool)
    others[rows] = False
    name = "model.language_model.embed_tokens.weight"
    assert torch.equal(again.model.get_input_embeddings().weight[others], before[name][others])


def test_everything_trains_when_asked(tmp_path):
    trainer = make_trainer(tmp_path, train_vision=True, train_tags_only=False)
    before = snapshot(trainer.model)
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        if not name.endswith("k_proj.bias"):
            assert not torch.equal(parameter, before[name]), f"{name} did not move"


@pytest.mark.parametrize("tags", [False, True])
def test_with_peft(tags, tmp_path):
    """Adapters everywhere but in the vision tower; PEFT itself trains the tags' rows."""
    peft = pytest.importorskip("peft", reason="needs the extra 'train'")
    rows = tag_ids(saved_model(tmp_path / "rows")[1])
    lora = peft.LoraConfig(
        r=4,
        target_modules=["q_proj", "v_proj", "qkv"],
        trainable_token_indices=rows if tags else None,
    )
    trainer = make_trainer(tmp_path, tied=False, lora=lora)
    before = snapshot(trainer.model)
    trainer.train()
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all("lora_" in name or "trainable_tokens" in name for name in moved)
    assert not [name for name in moved if ".visual." in name]
    assert any("trainable_tokens" in name for name in moved) == tags
    assert trainer.look_again_sessions == ()


@pytest.mark.parametrize("way", WAYS)
def test_loss_is_on_the_answer_alone(way, tmp_path):
    """By hand: the mean over the answers' tokens, and no reflection of a prompt triggers."""
    note = "Write <REFLECTION></REFLECTION> once. "
    trainer = make_trainer(tmp_path, WAYS[way], note=note)
    tokenizer = trainer.processing_class.tokenizer
    rows = [dict(trainer.train_dataset[i]) for i in range(2)]
    batch = dict(trainer.data_collator(rows))
    kept = batch["labels"] != -100
    for ids, mask in zip(batch["input_ids"], kept, strict=True):
        assert tokenizer.decode(ids[mask]).strip() == ANSWER + "<|im_end|>"
    trainer.model.eval()
    with trainer.looking() as sessions, torch.no_grad():
        loss = trainer.compute_loss(trainer.model, batch)
        if way != "off":
            trace = sessions[0].trace
            opened = (batch["input_ids"] == tokenizer.convert_tokens_to_ids("<REFLECTION>")) & kept
            places = opened.nonzero()[:, 1].tolist()
            assert [[r.key_index for r in row] for row in trace.reflections] == [
                [i] for i in places
            ]
        logits = trainer.model(**batch).logits
    assert (sessions == ()) == (way == "off")
    assert logits.shape[1] == batch["input_ids"].shape[1]  # re-injected tokens have no place
    chosen = logits[:, :-1].log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    assert loss.item() == pytest.approx(-chosen[kept[:, 1:]].mean().item(), abs=1e-5)
    with torch.no_grad():
        plain = trainer.compute_loss(trainer.model, batch)
    assert (abs(plain - loss) > 1e-4) == (way != "off")


@pytest.mark.parametrize("way", WAYS)
def test_predictions_are_made_as_the_model_was_trained(way, tmp_path):
    """Also with a reflection in the prompt, which does not trigger; and what metrics are given."""
    given = []

    def metrics(predicted):
        given.append(predicted.predictions)
        return {"seen": 1.0}

    note = "Write <REFLECTION></REFLECTION> once. "
    trainer = make_trainer(tmp_path, WAYS[way], note=note, per_device_eval_batch_size=1)
    rows = trainer.train_dataset
    found = trainer.predict(rows).predictions
    batch = dict(trainer.data_collator([dict(rows[0])]))
    trainer.model.eval()
    with trainer.looking(), torch.no_grad():
        logits = trainer.model(**batch).logits[0]
    assert torch.allclose(torch.tensor(found[0, : len(logits)]), logits, rtol=0, atol=1e-5)
    trainer.compute_metrics = metrics
    assert trainer.evaluate(rows)["eval_seen"] == 1.0
    assert (given[0] == found).all()


def test_detached_when_training_raises(tmp_path):
    trainer = make_trainer(tmp_path)
    collate, calls = trainer.data_collator, []

    def fails(rows):
        calls.append(trainer.look_again_sessions)
        if len(calls) == 2:
            raise RuntimeError("broken")
        return collate(rows)

    trainer.data_collator = fails
    with pytest.raises(RuntimeError, match="broken"):
        trainer.train()
    assert calls[0] and trainer.look_again_sessions == ()
    assert trainer.model.config.text_config._attn_implementation == "sdpa"
    assert not hasattr(trainer.model.config, "lookagain")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"packing": True}, "packing=True does not work with look_again='copy'"),
        ({"eval_packing": True}, "eval_packing=True does not work"),
        ({"padding_free": True}, "padding_free=True does not work with look_again='copy'"),
        ({"completion_only_loss": False}, "completion_only_loss=False does not work"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 does not work"),
        ({"look_again": "twice"}, "look_again must be one of"),
    ],
)
def test_what_cannot_be_is_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        LookAgainSFTConfig("out", bf16=False, use_cpu=True, **settings)


def test_optimizers_that_move_untouched_rows_are_refused(tmp_path):
    with pytest.raises(ValueError, match="train_tags_only=True with optim='adafactor'"):
        make_trainer(tmp_path, optim="adafactor")


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (lambda p: torch.optim.AdamW(p, weight_decay=0.1), "weight_decay of embedding and head is"),
        (lambda p: torch.optim.Adadelta(p), "the optimizer Adadelta: this optimizer may move rows"),
        (lambda p: torch.optim.AdamW(p, weight_decay=0.0), None),
        ((torch.optim.Rprop, {"lr": 1e-2}), "the optimizer Rprop: this optimizer may move rows"),
        ((torch.optim.AdamW, {"lr": 1e-2}), None),
    ],
)
def test_optimizers_that_are_handed_over_are_checked(optimizer, message, tmp_path):
    model, processor = saved_model(tmp_path / "model")
    settings = {"max_steps": 2, "bf16": False, "use_cpu": True, "report_to": []}
    settings |= {"save_strategy": "no", "disable_tqdm": True, "weight_decay": 0.1}
    given = {"optimizer_cls_and_kwargs": optimizer}
    if callable(optimizer):
        given = {"optimizers": (optimizer(model.parameters()), None)}
    keywords = {"train_dataset": answered(4), "processing_class": processor, **given}
    args = LookAgainSFTConfig(str(tmp_path / "out"), **settings)
    if message is not None:
        with pytest.raises(ValueError, match=message):
            LookAgainSFTTrainer(model, args, **keywords)
        return
    trainer = LookAgainSFTTrainer(model, args, **keywords)
    before = model.get_input_embeddings().weight.detach().clone()
    trainer.train()
    moved = (model.get_input_embeddings().weight != before).any(1).nonzero().flatten().tolist()
    assert moved == tag_ids(processor)


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_prompt_learning_is_refused_by_name(kind, tmp_path):
    peft = pytest.importorskip("peft", reason="needs the extra 'train'")
    adapter = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(ValueError, match=f"{kind} does not work with look_again='copy'.*LoRA"):
        make_trainer(tmp_path, lora=adapter, train_tags_only=False)
    model, _ = saved_model(tmp_path / "model")
    wrapped = peft.get_peft_model(model, adapter)
    args = LookAgainSFTConfig(str(tmp_path), bf16=False, use_cpu=True)
    with pytest.raises(ValueError, match=f"{kind} does not work with look_again='copy'"):
        LookAgainSFTTrainer(wrapped, args)


def test_loss_functions_without_labels_are_refused(tmp_path):
    config = LookAgainSFTConfig(str(tmp_path), bf16=False, use_cpu=True)
    with pytest.raises(ValueError, match="compute_loss_func does not work"):
        LookAgainSFTTrainer("nowhere", config, compute_loss_func=len)


def test_defaults_are_the_papers():
    config = LookAgainSFTConfig("out", bf16=False, use_cpu=True)
    assert (config.learning_rate, config.num_train_epochs) == (1e-5, 13)
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps) == (1, 8)
    assert (config.adam_beta1, config.adam_beta2) == (0.9, 0.999)
    assert config.get_warmup_steps(1000) == 10 and not config.train_vision


def test_rows_are_checked(tmp_path):
    model, processor = saved_model(tmp_path)
    assert [processor.tokenizer.convert_ids_to_tokens(i) in TAGS for i in tag_ids(processor)] == (
        [True] * 10
    )
    with pytest.raises(ValueError, match="rows must lie between 0 and"):
        train_only_rows(model, [10**6])
    with pytest.raises(ValueError, match="<SUMMARY>.* are not tokens of this tokenizer"):
        tag_ids(type("Empty", (), {"get_vocab": staticmethod(dict)})())
    weight = model.lm_head.weight
    assert train_only_rows(model, [3]) == [weight]
    gradient = torch.full_like(weight, torch.nan)
    gradient[3] = 1.0
    weight.backward(gradient)
    assert torch.equal(weight.grad[3], gradient[3])
    assert not weight.grad[:3].any() and not weight.grad[4:].any()
