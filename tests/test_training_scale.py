"""A step of training is the same however its batch is divided: processes, parts, DeepSpeed's ZeRO."""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch
from commands import ROOT, environment, launch, launch_command, python
from safetensors.torch import load_file

from engine.averaging import WeightAverage

DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(not DEEPSPEED, reason="needs deepspeed: pip install 'retort-distill[cluster]'")
# GroupNorm alone: unlike batch norm it does not see how a batch is divided
GENERATOR = [
    *("--config", str(ROOT / "configs" / "train_generator.yaml"), "data.holdout_per_class=50"),
    *("network.widths=[16,32]", "network.patch=4", "training.steps=12", "training.batch=16"),
    *("training.warmup_steps=2", "training.log_steps=1", "training.ema_decay=0.9"),
]


def deepspeed_launch(stage, *arguments, processes=2, precision="no"):
    """Run the generator's training under DeepSpeed on the CPU."""
    options = ["--config_file", str(ROOT / "launch" / f"deepspeed_zero{stage}.yaml"), "--mixed_precision", precision]
    options += ["--num_processes", str(processes), "--main_process_port", "0"]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *options]
    command = [*launcher, str(ROOT / "engine/train_generator.py"), *GENERATOR, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300, check=False)


def curve(folder):
    lines = (folder / "logs" / "rank-00000.jsonl").read_text().splitlines()
    return [event["loss"] for event in map(json.loads, lines) if event["event"] == "training"]


def weights(folder):
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def record(folder):
    return json.loads((folder / "training.json").read_text())


def assert_same_training(folder, other, tolerance=2e-5):
    assert len(curve(folder)) == 12
    assert curve(folder) == pytest.approx(curve(other), rel=tolerance)
    mine, theirs = weights(folder), weights(other)
    assert mine.keys() == theirs.keys()
    for name, weight in mine.items():
        assert torch.allclose(weight, theirs[name], atol=2e-4), name


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Return the training of one process, whole batches."""
    folder = tmp_path_factory.mktemp("plain")
    result = python("engine/train_generator.py", *GENERATOR, "--output", folder)
    assert result.returncode == 0, result.stderr
    assert len(set(curve(folder))) == 12
    return folder


@pytest.fixture(scope="module")
def data_parallel(tmp_path_factory):
    """Return the training of two processes under plain data parallelism."""
    folder = tmp_path_factory.mktemp("data_parallel")
    result = launch(2, "engine/train_generator.py", *GENERATOR, "--output", folder)
    assert result.returncode == 0, result.stderr
    assert record(folder)["strategy"] == "data parallel"
    return folder


def test_two_processes_train_as_one_does(plain, data_parallel):
    assert_same_training(data_parallel, plain)


def test_parts_of_gradient_accumulation_make_the_same_steps(plain, tmp_path):
    result = python("engine/train_generator.py", *GENERATOR, "training.accumulation=4", "--output", tmp_path)
    assert result.returncode == 0, result.stderr
    assert record(tmp_path)["accumulation"] == 4
    assert_same_training(tmp_path, plain)


def test_another_seed_is_another_training(plain, tmp_path):
    """The comparison above can fail."""
    result = python("engine/train_generator.py", *GENERATOR, "training.seed=1", "--output", tmp_path)
    assert result.returncode == 0, result.stderr
    with pytest.raises(AssertionError):
        assert_same_training(tmp_path, plain)


@needs_deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_follows_plain_data_parallelism(stage, data_parallel, tmp_path):
    result = deepspeed_launch(stage, "training.accumulation=2", "--output", tmp_path)
    assert result.returncode == 0, result.stderr
    made = record(tmp_path)
    assert (made["strategy"], made["processes"], made["accumulation"]) == (f"zero-{stage}", 2, 2)
    assert_same_training(tmp_path, data_parallel)
    assert made["figures"] == pytest.approx(record(data_parallel)["figures"], rel=1e-3)


def test_bf16_as_the_launcher_says(plain, tmp_path):
    command = launch_command(1, "engine/train_generator.py", *GENERATOR, "--output", str(tmp_path))
    command[command.index("--mixed_precision") + 1] = "bf16"
    env = {**environment(), "ACCELERATE_USE_CPU": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert record(tmp_path)["precision"] == "bf16"
    assert curve(tmp_path) != curve(plain)
    assert curve(tmp_path) == pytest.approx(curve(plain), rel=0.02)
    assert all(weight.dtype == torch.float32 for weight in weights(tmp_path).values())


DEEPSPEED_ASKED = {"ACCELERATE_USE_DEEPSPEED": "true"}


@pytest.mark.parametrize(
    ("change", "env", "message"),
    [
        ("training.accumulation=3", {}, "training.batch: 16 given; it must be a multiple of the 1 processes x 3 parts"),
        (
            "training.accumulation=1",
            {"ACCELERATE_MIXED_PRECISION": "fp16"},
            "--mixed_precision of the launcher: 'fp16' given; allowed on this device: no, bf16",
        ),
        pytest.param(
            "training.accumulation=1",
            {**DEEPSPEED_ASKED, "ACCELERATE_USE_CPU": "1"},
            "given with DeepSpeed, which Accelerate would drop silently; leave it out",
            marks=needs_deepspeed,
        ),
        pytest.param(
            "training.accumulation=1",
            DEEPSPEED_ASKED,
            "DeepSpeed was asked for by the launcher and is not installed; pip install 'retort-distill[cluster]'",
            marks=pytest.mark.skipif(DEEPSPEED, reason="deepspeed is installed"),
        ),
    ],
)
def test_what_cannot_be_divided_or_computed_here_ends_in_one_line(tmp_path, change, env, message):
    script = [sys.executable, str(ROOT / "engine/train_generator.py"), *GENERATOR, change, "--output", str(tmp_path)]
    result = subprocess.run(script, capture_output=True, text=True, env={**environment(), **env}, check=False)
    assert result.returncode == 2
    assert result.stderr.count(message) == 1, result.stderr


def test_the_average_follows_and_is_restored():
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    average = WeightAverage(layer.parameters(), 0.9)
    seen = [layer.weight.detach().clone()]
    for step in range(4):
        torch.nn.init.normal_(layer.weight)
        seen.append(layer.weight.detach().clone())
        average.step(layer.parameters())
        if step == 2:
            saved = {name: value.clone() for name, value in average.state_dict().items()}
    expected = seen[1]  # the first step takes the weights over; then the decay warms up
    for step in range(1, 4):
        kept = min(0.9, 1.0 - (1.0 + step) ** -0.75)
        expected = kept * expected + (1.0 - kept) * seen[step + 1]
    found = next(average.gather(layer.parameters()))
    assert torch.allclose(found, expected, atol=1e-6)
    again = WeightAverage(layer.parameters(), 0.9)
    again.load_state_dict(saved)
    again.step(layer.parameters())
    assert torch.equal(next(again.gather(layer.parameters())), found)
    assert torch.equal(next(WeightAverage(layer.parameters(), 0.0).gather(layer.parameters())), layer.weight)
