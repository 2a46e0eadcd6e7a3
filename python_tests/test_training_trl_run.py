"""Runs of the TRL trainers by their configuration: files written, kills survived, words said."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("trl", reason="needs the extra 'train'")

from rich.console import Console
from safetensors.torch import load_file
from tiny_training import ANSWER, saved_model

import lookagain_ext
from lookagain_ext.models.loading import load
from lookagain_ext.synthetic.scenes import Scene
from lookagain_ext.training.checkpoint import METRICS, read_metrics
from lookagain_ext.training.run_config import RunConfig
from lookagain_ext.training.run_data import read_data
from lookagain_ext.training.trainable import tag_ids
from lookagain_ext.training.trl_run import last_checkpoint, make_trainer, run

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
]
TRAINER = {
    "look_again": "copy",
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "save_steps": 2,
    "logging_steps": 1,
    "report_to": [],
}


def length_reward(completion_ids, **_):
    return [float(sum(ids) % 97) for ids in completion_ids]


def config(folder: Path, kind: str = "brpo", **changes) -> RunConfig:
    saved_model(folder / "base")
    own = {"num_generations": 2, "max_completion_length": 8} if kind == "brpo" else {}
    accumulate = {"gradient_accumulation_steps": 1}
    return RunConfig.from_dict(
        {
            "output": str(folder / "run"),
            "model": str(folder / "base"),
            "data": {"scenes": 6, "seed": 3},
            "trainer": {**TRAINER, **own, **accumulate},
            "dtype": "float32",
            **changes,
        }
    )


def quiet() -> Console:
    return Console(file=open(os.devnull, "w"), force_terminal=False)


@pytest.mark.parametrize("kind", ["brpo", "sft"])
def test_a_run_writes_what_it_promises(kind, tmp_path):
    done = run(kind, config(tmp_path, kind), rewards=[length_reward], console=quiet())
    assert done == tmp_path / "run/model"
    assert json.loads((done / "config.json").read_text())["lookagain"]["strategy"] == "copy"
    lines = read_metrics(tmp_path / "run" / METRICS)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all("loss" in line for line in lines)
    assert all(0 < line["visual_attention"] < 1 for line in lines)
    assert all(line["tokens_per_second"] > 0 for line in lines[1:])
    assert (tmp_path / "run/curves.png").read_bytes()[:4] == b"\x89PNG"
    assert RunConfig.load(tmp_path / "run/config.yaml") == config(tmp_path, kind)
    if kind == "brpo":
        assert all("reflections/count" in line and "kl" in line for line in lines)
        assert all("rewards/length_reward/mean" in line for line in lines)
        for line in lines:
            parts = [line[f"seconds/{part}"] for part in ("rollout", "scoring", "training")]
            assert min(parts) > 0
            assert sum(parts) == pytest.approx(line["step_time"], rel=0.1)  # nothing beside them
        samples = (tmp_path / "run/samples.txt").read_text()
        assert samples.count("--- step") == 4 and ">>> " in samples


@pytest.mark.parametrize("kind", ["brpo", "sft"])
def test_kill_and_resume_gives_the_same_weights(kind, tmp_path):
    plan = config(tmp_path, kind)
    straight = run(
        kind, plan, output=tmp_path / "straight", rewards=[length_reward], console=quiet()
    )
    path, broken = tmp_path / "run.yaml", Path(plan.output)
    path.write_text(yaml.safe_dump(plan.to_dict()))
    # Hangs for good in its fourth step, after the checkpoint of the second.
    script = (
        "import sys, time\n"
        "import torch\n"
        "torch.set_num_threads(1)\n"
        "from transformers import Trainer\n"
        "from lookagain_ext.training.trl_run import run\n"
        "step, done = Trainer.training_step, []\n"
        "def slow(*a, **k):\n"
        "    done.append(1)\n"
        "    if len(done) == 4: time.sleep(600)\n"
        "    return step(*a, **k)\n"
        "Trainer.training_step = slow\n"
        "def length_reward(completion_ids, **_):\n"
        "    return [float(sum(i) % 97) for i in completion_ids]\n"
        "run(sys.argv[1], sys.argv[2], rewards=[length_reward])\n"
    )
    command = [sys.executable, "-c", script, kind, str(path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(read_metrics(broken / METRICS)) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert last_checkpoint(broken).name == "checkpoint-2"
    (broken / "checkpoint-3").mkdir()  # one that was cut short
    resumed = run(kind, path, rewards=[length_reward], console=quiet())
    ours, theirs = (load_file(one / "model.safetensors") for one in (resumed, straight))
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=1e-6, msg=name)
    metrics = [read_metrics(one.parent / METRICS) for one in (resumed, straight)]
    assert [line["step"] for line in metrics[0]] == [1, 2, 3, 4]
    if kind == "brpo":
        samples = [(one.parent / "samples.txt").read_text() for one in (resumed, straight)]
        assert samples[0] == samples[1] and samples[0].count("--- step") == 4
    for one, other in zip(*metrics, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)


@pytest.mark.parametrize("kind", ["brpo", "sft"])
@pytest.mark.parametrize("lora", [None, {"r": 4, "target_modules": ["q_proj"]}])
def test_a_finished_run_trains_nothing_more(kind, lora, tmp_path):
    """Also one whose model is not written yet, in the middle of an epoch."""
    changes = {"lora": lora, "data": {"scenes": 30, "seed": 3}}
    plan = config(tmp_path, kind, **changes)
    plan.trainer["lr_scheduler_type"] = "constant"
    done = run(kind, plan, rewards=[length_reward], console=quiet())
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    weights = (done / name).read_bytes()
    lines = (tmp_path / "run" / METRICS).read_text()
    shutil.rmtree(done)
    for _ in range(2):
        assert run(kind, plan, rewards=[length_reward], console=quiet()) == done
        assert (done / name).read_bytes() == weights
        assert last_checkpoint(tmp_path / "run").name == "checkpoint-4"
        assert (tmp_path / "run" / METRICS).read_text() == lines


@pytest.mark.parametrize("way", ["copy", "route"])
def test_two_processes_of_which_one_reflects(way, tmp_path):
    """No hang, and metrics of both."""
    plan = config(tmp_path, trainer={**config(tmp_path).trainer, "max_steps": 2})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(plan.to_dict()))
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import torch\n"
        "from tiny_training import Recorder\n"
        "from lookagain_ext.training import trl_run\n"
        "made = trl_run.make_trainer\n"
        "def make(*a):\n"
        "    trainer = made(*a)\n"
        "    assert trainer.accelerator.num_processes == 2\n"
        "    steps = [[1, 3], [2], [], [0]] if trainer.accelerator.process_index else [[]] * 4\n"
        "    Recorder(trainer.model, trainer.processing_class, steps)\n"
        "    return trainer\n"
        "trl_run.make_trainer = make\n"
        "reward = lambda completion_ids, **_: [float(sum(i) % 97) for i in completion_ids]\n"
        "trl_run.run('brpo', sys.argv[1], look_again=sys.argv[2], rewards=[reward])\n"
    )
    settings = Path(lookagain_ext.__file__).parent / "configs/accelerate/cpu-2.yaml"
    launch = [sys.executable, "-m", "accelerate.commands.launch", f"--config_file={settings}"]
    command = [*launch, str(script), str(tmp_path / "run.yaml"), way]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = read_metrics(Path(plan.output) / METRICS)
    assert [line["reflections/count"] for line in lines] == [0.5, 0.5]


@pytest.mark.parametrize("kind", ["brpo", "sft"])
def test_two_processes_train_as_one_with_the_same_rows(kind, tmp_path):
    """Loss, gradient and weights, at equal global batch; rollouts are made to depend on nothing
    but the row: the likeliest token each time, reflections at forced steps. The same for a batch
    that is accumulated, in fine-tuning."""
    plan = config(tmp_path, kind, data={"scenes": 8, "seed": 3})  # two whole batches of four
    trainer = {**plan.trainer, "max_steps": 2, "look_again": "copy", "optim": "sgd"}
    trainer |= {"max_grad_norm": 1e9, "lr_scheduler_type": "constant", "warmup_steps": 0}
    if kind == "brpo":
        trainer |= {"top_k": 1, "beta": 0.5, "num_generations": 2}
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import torch\n"
        "torch.set_num_threads(1)\n"
        "from tiny_training import Recorder\n"
        "from lookagain_ext.training import trl_run\n"
        "made = trl_run.make_trainer\n"
        "def make(*a):\n"
        "    trainer = made(*a)\n"
        "    steps = [[1, 3], [2], [], [0]]\n"
        "    if trainer.accelerator.num_processes == 2:\n"
        "        first = 2 * trainer.accelerator.process_index\n"
        "        steps = steps[first : first + 2]\n"
        "    Recorder(trainer.model, trainer.processing_class, steps)\n"
        "    return trainer\n"
        "trl_run.make_trainer = make\n"
        "reward = lambda completion_ids, **_: [float(sum(i) % 97) for i in completion_ids]\n"
        "trl_run.run(sys.argv[1], sys.argv[2], rewards=[reward])\n"
    )
    lines, weights = [], []
    for processes, accumulated in ((1, 1), (2, 1), *([(1, 2)] if kind == "sft" else [])):
        rows = {"per_device_train_batch_size": 4 // processes // accumulated}
        rows["gradient_accumulation_steps"] = accumulated
        folder = tmp_path / f"with-{processes}-{accumulated}"
        run_plan = {**plan.to_dict(), "output": str(folder), "trainer": {**trainer, **rows}}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(run_plan))
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launch.append(f"--nproc_per_node={processes}")
        command = [*launch, str(script), kind, str(tmp_path / "run.yaml")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
        assert done.returncode == 0, done.stderr[-2000:]
        lines.append(read_metrics(folder / METRICS))
        weights.append(load_file(folder / "model/model.safetensors"))
    before = load_file(tmp_path / "base/model.safetensors")
    assert [line["step"] for line in lines[0]] == [1, 2]
    moved = sum(float((weights[0][name] - before[name]).abs().sum()) for name in before)
    assert moved > 0
    for other, made in zip(lines[1:], weights[1:], strict=True):
        for one, two in zip(lines[0], other, strict=True):
            for name in ("loss", "grad_norm", *(["kl"] if kind == "brpo" else [])):
                assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name
        apart = sum(float((weights[0][name] - made[name]).abs().sum()) for name in before)
        assert apart < 1e-3 * moved


def test_an_adapter_that_trains_the_tags(tmp_path):
    """Their rows of embedding and head, no other; what is saved can be loaded and trained on."""
    lora = {"r": 4, "target_modules": ".*language_model.layers.*q_proj"}
    plan = config(tmp_path, "sft", lora={**lora, "trainable_token_indices": "tags"})
    plan = RunConfig.from_dict({**plan.to_dict(), "trainer": {**plan.trainer, "max_steps": 2}})
    plan.trainer["train_tags_only"] = False
    base, processor = saved_model(tmp_path / "base", tied=False)
    done = run("sft", plan, console=quiet())
    model, _ = load(done)
    tags = set(tag_ids(processor))
    for part in ("get_input_embeddings", "get_output_embeddings"):
        old, new = (getattr(one, part)().weight for one in (base, model))
        assert set((old != new).any(1).nonzero().flatten().tolist()) == tags, part
    layers = (one.model.language_model.layers[0].self_attn for one in (base, model))
    old, new = layers
    assert not torch.equal(old.q_proj.weight, new.q_proj.weight)
    assert torch.equal(old.k_proj.weight, new.k_proj.weight)


@pytest.mark.parametrize("lora", [None, {"r": 4, "target_modules": ["q_proj"]}])
@pytest.mark.parametrize("way", ["off", {"strategy": "route", "route_ratio": 0.3}], ids=str)
def test_what_is_saved_says_how_it_was_trained(lora, way, tmp_path):
    """And not what the base said."""
    trainer = {**TRAINER, "max_steps": 2, "look_again": way, "gradient_accumulation_steps": 1}
    trainer["train_tags_only"] = lora is None
    plan = config(tmp_path, "sft", lora=lora, trainer=trainer)
    said = tmp_path / "base/config.json"
    plain = {**json.loads(said.read_text()), "lookagain": {"strategy": "copy"}}
    said.write_text(json.dumps(plain))
    done = run("sft", plan, console=quiet())
    wanted = {"strategy": "off"} if way == "off" else way
    for folder in (done, tmp_path / "run/checkpoint-2"):
        model, processor = load(folder)
        with lookagain_ext.look_again(model, None, processor) as session:
            found = session.config.to_dict()
        assert found | wanted == found, folder
    assert (done / "config.json").is_file() == (lora is None)  # an adapter's would be a model's


def test_resume_refuses_another_configuration(tmp_path):
    short = {**config(tmp_path).trainer, "max_steps": 2}
    run("brpo", config(tmp_path, trainer=short), rewards=[length_reward], console=quiet())
    other = config(tmp_path, data={"scenes": 7})
    with pytest.raises(ValueError, match="another configuration .data, trainer differ"):
        run("brpo", other, rewards=[length_reward], console=quiet())
    with pytest.raises(ValueError, match="already holds checkpoint-2"):
        run("brpo", config(tmp_path, trainer=short), resume=False, console=quiet())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {}}, "data must have one of scenes and path"),
        ({"data": {"scenes": 1, "sedd": 1}}, "data has no entry sedd"),
        ({"trainer": {"output_dir": "x"}}, "named by output"),
        ({"modle": "x"}, "the configuration has no entry modle"),
        ({"trainer": {"use_vllm": True, "look_again": "copy"}}, "use_vllm=True does not work"),
        ({"lora": {"rank": 4}}, "lora has no entry rank"),
        ({"trainer": {"lerning_rate": 1}}, "did you mean learning_rate?"),
        ({"trainer": {"learning_rate": "1e-5"}}, "trainer: learning_rate must be a number, got"),
        ({"trainer": {"max_steps": "2"}}, "max_steps must be a whole number, .*without quotes"),
        ({"trainer": {"max_steps": 2.5}}, "max_steps must be a whole number, got 2.5"),
        ({"trainer": {"bf16": "no"}}, "bf16 must be true or false or null, got 'no'"),
        ({"trainer": {"look_again": False}}, "trainer: look_again .*put off in quotes"),
        ({"data": {"path": "missing.jsonl"}}, "data: there is no file missing.jsonl"),
        ({"data": {"scenes": 0}}, "data: scenes must be a whole number from 1 on, got 0"),
        ({"data": {"scenes": "x"}}, "data: scenes must be a whole number from 1 on, got 'x'"),
        ({"data": {"path": 3}}, "data: path must be a text, got 3"),
        ({"rewards": {"foo": 1}}, "rewards has no entry foo"),
        ({"rewards": {"target_length": "x"}}, "rewards: target_length must be a number above 0"),
        ({"rewards": {"weights": 1}}, "rewards: weights must be a list of numbers"),
        ({"lora": True}, "lora must hold names and values, got True"),
        ({"lora": {"r": "four"}}, "lora: r must be a whole number, got 'four'"),
        ({"threads": "two"}, "threads must be a whole number from 0 on, got 'two'"),
        ({"threads": -1}, "threads must be a whole number from 0 on, got -1"),
        ({"output": 5}, "output must be a text, got 5"),
        ({"output": None}, "output must be a text, got None"),
        ({"dtype": 16}, "dtype must be a text"),
    ],
)
def test_wrong_configurations_are_named(changes, message, tmp_path):
    plain = {"output": str(tmp_path), "model": "nowhere", "data": {"scenes": 1}}
    with pytest.raises(ValueError, match=message):
        make_trainer("brpo", RunConfig.from_dict({**plain, **changes}), [length_reward])


def test_a_number_without_a_point_is_a_number_and_sft_has_no_rewards(tmp_path):
    path = tmp_path / "run.yaml"
    plain = "output: x\nmodel: y\ndata: {scenes: 1}\n"
    path.write_text(plain + "trainer: {learning_rate: 1e-5, beta: -2E3}\n")
    assert RunConfig.load(path).trainer == {"learning_rate": 1e-5, "beta": -2000.0}
    path.write_text(plain + "rewards: {preset: paper}\n")
    with pytest.raises(ValueError, match="rewards: only BRPO has them"):
        make_trainer("sft", RunConfig.load(path))


def test_data_that_cannot_be_read_is_named(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("{broken\n")
    with pytest.raises(ValueError, match="data: .*data.jsonl cannot be read: ") as told:
        read_data("brpo", {"path": str(path)})
    assert "\n" not in str(told.value)
    with pytest.raises(ValueError, match="data: .*nowhere cannot be read: "):
        read_data("brpo", {"path": str(tmp_path / "nowhere")})
    Scene.random(1).render(1).save(tmp_path / "one.png")
    row = {"question": "?", "image": str(tmp_path / "one.png")}
    rows = [row | {"answer": "2"}, row | {"answer": None}]
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    with pytest.raises(ValueError, match="data: row 1 has no answer"):
        read_data("brpo", {"path": str(path)})


def test_data_from_a_file(tmp_path):
    Scene.random(1).render(1).save(tmp_path / "one.png")
    rows = [
        {
            "question": f"{i}?",
            "image": str(tmp_path / "one.png"),
            "completion": ANSWER,
            "answer": "2",
        }
        for i in range(2)
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = read_data("brpo", {"path": str(path)})
    assert table[1]["prompt"] == [{"role": "user", "content": "1?"}]
    assert table[1]["answer"] == "2" and table[1]["images"][0].size == (168, 168)
    table = read_data("sft", {"path": str(path)})
    assert table[0]["completion"] == [{"role": "assistant", "content": ANSWER}]
    path.write_text('{"question": "a"}\n')
    with pytest.raises(ValueError, match="data lacks the column answer, image"):
        read_data("brpo", {"path": str(path)})


def test_records_of_a_known_shape(tmp_path):
    Scene.random(1).render(1).save(tmp_path / "one.png")
    chat = [{"from": "human", "value": "<image>\nHow many?"}, {"from": "gpt", "value": ANSWER}]
    path = tmp_path / "cot.jsonl"
    path.write_text(json.dumps({"id": "a", "image": "one.png", "conversations": chat}) + "\n")
    row = read_data("sft", {"path": str(path), "reader": "llava-cot"})[0]
    assert row["prompt"] == [{"role": "user", "content": "How many?"}]
    assert row["completion"] == [{"role": "assistant", "content": ANSWER}]
    assert row["images"][0].size == (168, 168)
    path = tmp_path / "geometry.jsonl"
    path.write_text(json.dumps({"problem": "How many?", "answer": "2", "image": "one.png"}) + "\n")
    row = read_data("brpo", {"path": str(path), "reader": "geometry"})[0]
    assert row["prompt"] == [{"role": "user", "content": "How many?"}] and row["answer"] == "2"
    path.write_text(json.dumps({"problem": "Why?", "answer": "3", "image": "one.png"}) + "\n")
    row = read_data("brpo", {"path": str(path), "reader": "geometry"})[0]
    assert row["answer"] == "3"  # not what the cache has of the file as it was
    path.write_text(json.dumps({"problem": "Why?", "answer": "3", "image": "none.png"}) + "\n")
    with pytest.raises(ValueError, match="record 0 of .*geometry.jsonl"):
        read_data("brpo", {"path": str(path), "reader": "geometry"})
    with pytest.raises(ValueError, match="a reader needs a path"):
        RunConfig("out", "lookagain-tiny", {"scenes": 3, "reader": "geometry"})


@pytest.mark.parametrize("name", ["tiny/brpo", "qwen2.5-vl-7b/brpo", "qwen2.5-vl-7b/sft"])
def test_packaged_configurations_are_valid(name, tmp_path):
    from lookagain_ext.training.brpo import BRPOConfig
    from lookagain_ext.training.trl_sft import LookAgainSFTConfig

    found = RunConfig.load(f"configs/{name}.yaml")
    made = BRPOConfig if name.endswith("brpo") else LookAgainSFTConfig
    here = {"bf16": False, "use_cpu": True}
    if name == "qwen2.5-vl-7b/brpo":  # 8 processes with 2 rows each are one with 16
        here["per_device_train_batch_size"] = 8 * found.trainer["per_device_train_batch_size"]
    args = made(str(tmp_path), **{**found.trainer, **here})
    papers = made(str(tmp_path), bf16=False, use_cpu=True)
    if name.startswith("qwen"):
        for field in ("learning_rate", "warmup_steps", "adam_beta1", "adam_beta2"):
            assert getattr(args, field) == getattr(papers, field)
