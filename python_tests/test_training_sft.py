import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console

from lookagain_ext.synthetic.processor import SceneProcessor, letterbox
from lookagain_ext.synthetic.scenes import Scene, Shape
from lookagain_ext.synthetic.tiny import build_processor, build_tiny, load_tiny
from lookagain_ext.synthetic.vocabulary import CELLS, COLOURS, KINDS
from lookagain_ext.training.checkpoint import (
    CHECKPOINT,
    METRICS,
    load_checkpoint,
    read_metrics,
    rewind_metrics,
    save_checkpoint,
)
from lookagain_ext.training.coldstart import remove_reflections
from lookagain_ext.training.config import SFTConfig, Stage
from lookagain_ext.training.data import (
    ATTRIBUTES,
    IGNORE,
    SceneBatches,
    cell_labels,
    patchify,
    spelled,
)
from lookagain_ext.training.sft import learning_rate, train
from lookagain_ext.training.stages import looking_again, looking_loss, loss_of, word_loss

SIZES = {"text_hidden": 64, "text_layers": 1, "vision_hidden": 32, "vision_layers": 1}


@pytest.fixture(scope="module")
def processor() -> SceneProcessor:
    return build_processor()


def small(output: Path, **changes: object) -> SFTConfig:
    """Three stages of a few steps each."""
    stages = [
        {"name": "see", "task": "vision", "steps": 3, "batch_size": 2, "learning_rate": 1e-3},
        {"name": "read", "task": "exercise", "steps": 3, "batch_size": 2, "learning_rate": 1e-3},
        {
            "name": "tell",
            "task": "answer",
            "steps": 4,
            "batch_size": 2,
            "learning_rate": 1e-3,
            "rehearsal": 0.5,
        },
    ]
    for stage in stages:
        stage["warmup"] = 1
    data = {
        "output": str(output),
        "stages": stages,
        "model": SIZES,
        "checkpoint_every": 2,
        "log_every": 1,
        "threads": 1,
        "workers": 0,
        "held_out": 0,
    }
    return SFTConfig.from_dict({**data, **changes})


def quiet() -> Console:
    return Console(file=open(os.devnull, "w"), force_terminal=False)


def test_packaged_configuration_is_valid() -> None:
    config = SFTConfig.load("configs/tiny.yaml")
    assert config == SFTConfig.load("tiny.yaml")
    assert [stage.task for stage in config.stages][0] == "vision"
    assert config.stages[-1].look_again in ("copy", "route")
    assert SFTConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": []}, "at least one stage"),
        ({"stages": "all"}, "stages must be a list"),
        ({"speed": 3}, "the configuration has no entry speed"),
        ({"precision": "fp8"}, "precision must be one of fp32, bf16"),
        ({"stages": [{"name": "x"}]}, "stage 1: .*task"),
        ({"log_every": 0}, "log_every must be at least 1"),
    ],
)
def test_wrong_configurations_are_named(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        small(tmp_path, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "sleep"}, "task must be one of"),
        ({"steps": 0}, "steps of stage 's'"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"look_again": False}, "look_again .* in quotes"),
        ({"route_ratio": 50}, r"route_ratio must lie in \[0, 1\], got 50"),
        ({"task": "vision", "look_again": "copy"}, "must be off in a vision stage"),
    ],
)
def test_wrong_stages_are_named(change: dict[str, object], message: str) -> None:
    good = {"name": "s", "task": "answer", "steps": 1, "batch_size": 1, "learning_rate": 1e-3}
    Stage(**good)
    with pytest.raises(ValueError, match=message):
        Stage(**{**good, **change})


def test_missing_file_and_broken_yaml_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no configuration .*nowhere\.yaml; packaged ones are"):
        SFTConfig.load(tmp_path / "nowhere.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1")
    with pytest.raises(ValueError, match="is not YAML"):
        SFTConfig.load(broken)


def test_learning_rate_rises_and_falls() -> None:
    stage = Stage("s", "answer", 100, 1, 1.0, warmup=10)
    rates = [learning_rate(stage, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[10] == pytest.approx(1.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=0.01)


def test_patchify_equals_the_processor(processor: SceneProcessor) -> None:
    pictures = [letterbox(Scene.random(i).render(2), 168) for i in range(3)]
    batch = torch.from_numpy(np.stack([np.asarray(one) for one in pictures]))
    expected = np.concatenate([processor.patches(one) for one in pictures])
    np.testing.assert_allclose(patchify(batch, processor).numpy(), expected, atol=1e-6)


def test_cell_labels_by_hand() -> None:
    labels = cell_labels(Scene((Shape("square", "blue", "large", "C2"),))).reshape(6, 6, 5)
    assert labels[2, 3].tolist() == [2, 2, 3, 2, 8]
    assert [words[i] for words, i in zip(ATTRIBUTES.values(), labels[2, 3], strict=True)] == [
        " square",
        " squares",
        " blue",
        " large",
        " C2",
    ]
    assert labels[0, 0].tolist() == labels[5, 0].tolist() == [0, 0, 0, 0, 0]
    assert labels[5, 1].tolist() == [0, 0, 0, 0, 21]
    assert np.count_nonzero(labels[..., :4]) == 4


def test_batches_depend_on_the_step_alone(processor: SceneProcessor) -> None:
    stage = Stage("s", "answer", 10, 3, 1e-3, rehearsal=0.3)
    data = SceneBatches(stage, processor, seed=1)
    late = data[7]
    again = SceneBatches(stage, processor, seed=1)[7]
    assert all(torch.equal(late[name], again[name]) for name in late)
    assert not torch.equal(late["pictures"], data[6]["pictures"])


def test_loss_is_on_the_answer_alone(processor: SceneProcessor) -> None:
    batch = SceneBatches(Stage("s", "answer", 1, 4, 1e-3), processor, 0)[0]
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        trained = processor.tokenizer.decode(ids[labels != IGNORE])
        assert trained.startswith("<SUMMARY>") and trained.endswith("</CONCLUSION><|im_end|>")
        assert torch.equal(ids[labels != IGNORE], labels[labels != IGNORE])
    assert torch.equal(batch["mm_token_type_ids"].sum(1), torch.full((4,), processor.visual_tokens))


def test_plain_answers_hold_no_reflection_and_no_evidence(processor: SceneProcessor) -> None:
    answer, plain = (
        SceneBatches(Stage("s", task, 1, 4, 1e-3), processor, 0)[0] for task in ("answer", "plain")
    )
    for whole, bare in zip(answer["labels"], plain["labels"], strict=True):
        whole, bare = (processor.tokenizer.decode(one[one != IGNORE]) for one in (whole, bare))
        assert "<REFLECTION>" in whole and bare.endswith("<|im_end|>")
        whole, bare = (text.removesuffix("<|im_end|>") for text in (whole, bare))
        assert bare == remove_reflections(whole)


def test_a_run_writes_what_it_promises(tmp_path: Path) -> None:
    model = train(small(tmp_path), console=quiet())
    assert model == tmp_path / "model"
    lines = read_metrics(tmp_path / METRICS)
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert [line["stage"] for line in lines] == ["see"] * 3 + ["read"] * 3 + ["tell"] * 4
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert SFTConfig.load(tmp_path / "config.yaml") == small(tmp_path)
    trained, _ = load_tiny(model)
    fresh, _ = load_tiny(tmp_path / "see")
    after = dict(trained.named_parameters())
    for name, parameter in fresh.named_parameters():
        assert not torch.equal(parameter, after[name]), f"{name} was not trained"


def test_overfits_one_small_set(tmp_path: Path) -> None:
    stage = {
        "name": "see",
        "task": "vision",
        "steps": 30,
        "batch_size": 4,
        "learning_rate": 5e-3,
        "warmup": 5,
    }
    train(small(tmp_path, stages=[stage]), console=quiet())
    lines = read_metrics(tmp_path / METRICS)
    assert lines[-1]["loss"] < 0.6 * lines[0]["loss"]


def test_kill_and_resume_gives_the_same_bits(tmp_path: Path) -> None:
    straight = train(small(tmp_path / "straight"), console=quiet())
    broken = tmp_path / "broken"
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(small(broken).to_dict()))
    # A process that hangs for good in its sixth step, after the checkpoint of step 4.
    script = (
        "import sys, time\n"
        "from lookagain_ext.training import sft\n"
        "step, done = sft._step, []\n"
        "def slow(*a):\n"
        "    done.append(1)\n"
        "    if len(done) == 6: time.sleep(600)\n"
        "    return step(*a)\n"
        "sft._step = slow\n"
        "sft.train(sys.argv[1])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(read_metrics(broken / METRICS)) < 5:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert torch.load(broken / CHECKPOINT, weights_only=False)["step"] == 1
    resumed = train(path, console=quiet())
    for name in ("model.safetensors", "config.json"):
        assert (resumed / name).read_bytes() == (straight / name).read_bytes(), name
    ours, theirs = (read_metrics(one.parent / METRICS) for one in (resumed, straight))
    strip = ("seconds", "rate")
    assert [{k: v for k, v in line.items() if k not in strip} for line in ours] == [
        {k: v for k, v in line.items() if k not in strip} for line in theirs
    ]


def test_resume_refuses_another_configuration(tmp_path: Path) -> None:
    stages = [{"name": "s", "task": "vision", "steps": 1, "batch_size": 1, "learning_rate": 1e-3}]
    train(small(tmp_path, stages=stages), console=quiet())
    with pytest.raises(ValueError, match="another configuration .seed differ"):
        train(small(tmp_path, stages=stages, seed=5), console=quiet())
    with pytest.raises(ValueError, match="already holds"):
        train(small(tmp_path, stages=stages), resume=False, console=quiet())


def test_checkpoint_brings_back_random_numbers(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path) is None
    save_checkpoint(tmp_path, {"step": 3})
    first = (torch.rand(2).tolist(), np.random.rand(2).tolist())
    assert load_checkpoint(tmp_path)["step"] == 3
    assert (torch.rand(2).tolist(), np.random.rand(2).tolist()) == first
    assert [one.name for one in tmp_path.iterdir()] == [CHECKPOINT]


def test_metrics_survive_a_cut_line(tmp_path: Path) -> None:
    path = tmp_path / METRICS
    path.write_text("".join(json.dumps({"step": i}) + "\n" for i in range(5)) + '{"st')
    assert len(read_metrics(path)) == 5
    rewind_metrics(path, 2)
    assert [line["step"] for line in read_metrics(path)] == [0, 1, 2]


@pytest.mark.parametrize("task", ["exercise", "short"])
def test_looks_point_at_the_cell_that_is_spoken_of(task: str, processor: SceneProcessor) -> None:
    batch = SceneBatches(Stage("s", task, 1, 3, 1e-3), processor, 0)[0]
    tokens = processor.tokenizer.convert_ids_to_tokens
    seen = 0
    for ids, looks in zip(batch["input_ids"], batch["looks"], strict=True):
        for i in (looks >= 0).nonzero()[:, 0].tolist():
            following = tokens(ids[i + 1].item()).lstrip("Ġ")
            if following in ("none", "."):
                assert looks[i] == 0
                continue
            past = [one.lstrip("Ġ") for one in tokens(ids[: i + 2].tolist())]
            cell = [one for one in past if one in CELLS][-1]
            if following == ",":
                cell = tokens(ids[i + 2].item()).lstrip("Ġ")
                following = cell
            row, column = divmod(looks[i].item(), 6)
            assert (row, column) == (int(cell[1]), "ABCDE".index(cell[0]) + 1)
            assert following == cell or following in {*COLOURS, *KINDS, "small", "large", "nothing"}
            seen += 1
    assert seen > 30


def test_looking_loss_by_hand() -> None:
    weights = torch.zeros(1, 4, 3, 5)
    weights[0, :2, 1, 2] = torch.tensor([0.5, 0.25])
    weights[0, 2:, 1, 2] = 1.0  # the other half of the heads is free
    loss = looking_loss(weights, torch.tensor([[-1, 1, -1]]), first=1)
    assert loss.item() == pytest.approx(-np.log(0.375), abs=1e-4)


def test_matched_words_have_a_small_loss(processor: SceneProcessor) -> None:
    model, _ = build_tiny(0, **SIZES)
    labels = torch.from_numpy(cell_labels(Scene.random(1)))
    embedding = model.get_input_embeddings().weight
    groups = [
        embedding[processor.tokenizer.convert_tokens_to_ids(spelled(words))]
        for words in ATTRIBUTES.values()
    ]
    right = sum(group[labels[:, i]] for i, group in enumerate(groups))
    wrong = sum(group[(labels[:, i] + 1) % len(group)] for i, group in enumerate(groups))
    (good, share), (bad, miss) = (word_loss(model, t, labels, processor) for t in (right, wrong))
    assert good < bad and share > 0.2 > miss


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_copy_is_active_in_the_training_forward(precision: str, processor: SceneProcessor) -> None:
    model, _ = build_tiny(0, **SIZES)
    stage = Stage("s", "answer", 1, 2, 1e-3, look_again="copy")
    batch = SceneBatches(stage, processor, 0)[0]

    def loss(stage: Stage) -> torch.Tensor:
        with (
            looking_again(model, stage, processor.tokenizer),
            torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
        ):
            return loss_of(model, batch, processor)[0]

    off = Stage("s", "answer", 1, 2, 1e-3)
    none = Stage("s", "answer", 1, 2, 1e-3, look_again="route", route_ratio=0.0)
    close = {"abs": 1e-4 if precision == "fp32" else 1e-2}
    assert loss(none).item() == pytest.approx(loss(off).item(), **close)
    if precision == "fp32":
        assert abs(loss(stage).item() - loss(off).item()) > 1e-4
    loss(stage).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
