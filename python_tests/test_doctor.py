"""The doctor passes sound models and finds broken ones; the template's tags become tokens."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES, REFLECTION, tiny_inputs, tiny_model

from lookagain_ext.attention import ATTENTION_NAME
from lookagain_ext.doctor import doctor
from lookagain_ext.generation import LookAgainConfig, look_again
from lookagain_ext.template import TAGS
from lookagain_ext.tokens import add_reflection_tokens, find_reflection_token

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = [[3, (2, 3), 4], [2, (2, 2), 2, (1, 3), 3]]


def config(**fields):
    return LookAgainConfig(**{"reflection_token_id": REFLECTION, **fields})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_sound_models_pass(family, dtype):
    model, inputs = tiny_model(family, dtype), tiny_inputs(ROWS, dtype)
    report = doctor(model, inputs, config=config())
    assert report.ok, str(report)
    assert "Looking again holds" in str(report) and len(report.checks) == 6
    assert model.config.text_config._attn_implementation != ATTENTION_NAME


@pytest.mark.parametrize("backend", ["append", "reencode"])
def test_other_backends_pass(backend):
    model, inputs = tiny_model(), tiny_inputs(ROWS)
    report = doctor(model, inputs, config=config(backend=backend, strategy="route"))
    assert report.ok, str(report)


def failed(report):
    return {check.name for check in report.checks if not check.passed}


def test_finds_hooks_that_no_longer_reach_the_model(monkeypatch):
    from lookagain_ext.engine import Engine

    monkeypatch.setattr(Engine, "before_base", lambda self, keywords: keywords)
    report = doctor(tiny_model(), tiny_inputs([[3, (2, 3), 4]]), config=config())
    assert failed(report) == {"a reflection looks"} and "FAIL" in str(report)


def test_finds_a_wrong_rotation(monkeypatch):
    """Frequencies of another model: a turned key is no longer that of the new position."""
    from lookagain_ext.models import Family

    right = Family.inv_freq
    monkeypatch.setattr(Family, "inv_freq", lambda self: right(self) * 1.5)
    wrong = doctor(tiny_model(), tiny_inputs(ROWS), config=config(backend="virtual"))
    # Both backends turn alike, so they agree: only the numbers of the right model tell.
    monkeypatch.undo()
    assert wrong.ok
    monkeypatch.setattr("lookagain_ext.rollout.ops.append_visual_", lambda *args, **keywords: None)
    report = doctor(tiny_model(), tiny_inputs(ROWS), config=config())
    assert failed(report) == {"virtual = append"}


def test_refuses():
    model, inputs = tiny_model(), tiny_inputs(ROWS)
    with pytest.raises(ValueError, match="reflections must lie between 0 and 22"):
        doctor(model, inputs, config=config(), reflections=(30,))
    with pytest.raises(ValueError, match="an image in every row"):
        doctor(model, tiny_inputs([[4]]), config=config())
    with pytest.raises(ValueError, match="nothing to check"):
        doctor(model, inputs, config=config(strategy="off"))
    with look_again(model, config()), pytest.raises(ValueError, match="detach it first"):
        doctor(model, inputs, config=config())


def letters(vocabulary):
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    words = {chr(33 + number): number for number in range(vocabulary)}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=words, merges=[]))
    return PreTrainedTokenizerFast(tokenizer_object=model)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("spare", [0, 32])
def test_add_reflection_tokens(tied, spare):
    model, tokenizer = tiny_model(), letters(64 - spare)
    if tied:
        model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
        model.lm_head.weight = model.get_input_embeddings().weight
    before = model.get_input_embeddings().weight.detach().clone()
    head = model.get_output_embeddings().weight.detach().clone()
    with pytest.raises(ValueError, match="add_reflection_tokens"):
        look_again(model, LookAgainConfig(), tokenizer)
    pieces = tokenizer.encode("<REFLECTION>", add_special_tokens=False)
    ids = add_reflection_tokens(model, tokenizer)
    assert set(ids) == set(TAGS) and sorted(ids.values()) == [*range(64 - spare, 74 - spare)]
    after = model.get_input_embeddings().weight
    rows = 64 - spare
    assert len(after) == max(64, rows + 10) and torch.equal(after[:rows], before[:rows])
    torch.testing.assert_close(after[ids["<REFLECTION>"]], before[pieces].mean(0))
    out = model.get_output_embeddings().weight
    torch.testing.assert_close(out[ids["</REFLECTION>"]].norm() > 0, torch.tensor(True))
    torch.testing.assert_close(out[ids["<REFLECTION>"]], head[pieces].mean(0))
    assert tokenizer.encode("<REFLECTION>", add_special_tokens=False) == [ids["<REFLECTION>"]]
    assert tokenizer.decode([ids["<REFLECTION>"]], skip_special_tokens=True) == "<REFLECTION>"
    assert find_reflection_token(tokenizer, "<REFLECTION>") == ids["<REFLECTION>"]
    again = after.detach().clone()
    assert add_reflection_tokens(model, tokenizer) == ids
    assert torch.equal(model.get_input_embeddings().weight, again)
