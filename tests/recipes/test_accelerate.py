"""The accelerate configurations: what accelerate makes of each, and what it starts.

Each file names a launch command in its first lines; that command is what the tests read.
"""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import (
    DeepSpeedPlugin,
    FullyShardedDataParallelPlugin,
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
)
from arguments import parse
from text_classification import Recipe
from torch.distributed.fsdp import StateDictType
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers import TrainingArguments

from tests import tiny
from tests.recipes import test_text_classification
from tl_callbacks import PreflightError, attach

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "recipes/accelerate"
FILES = sorted(path for path in FOLDER.rglob("*") if path.is_file())
RANKS = Path(__file__).with_name("launched_ranks.py")
RECIPE = Path(__file__).with_name("launched_recipe.py")

model = test_text_classification.model

# By file: what its comment says, the kind, the processes of all machines together, the machines, the launcher's switch.
EXPECTED = {
    "cpu": ("One process on the CPU.", "NO", 1, 1, None),
    "cpu2": ("Two processes on the CPU:", "MULTI_GPU", 2, 1, "multi_gpu"),
    "ddp": ("Two GPUs of this machine, one process each, a copy", "MULTI_GPU", 2, 1, "multi_gpu"),
    "deepspeed_zero2": ("Two GPUs of this machine, one process each, gradients", "DEEPSPEED", 2, 1, "use_deepspeed"),
    "fsdp2": ("Two GPUs of this machine, one process each, the model sharded", "FSDP", 2, 1, "use_fsdp"),
    "multi_node": ("Two machines with two GPUs each, one process a GPU", "MULTI_GPU", 4, 2, "multi_gpu"),
}


def command(path: Path) -> list[str]:
    """The words of the launch command in a file's first lines."""
    words = []
    for line in path.read_text().splitlines():
        assert line.startswith("# "), f"{path.name} begins with a command"
        words.append(line[2:].removesuffix("\\"))
        if not line.endswith("\\"):
            break
    return shlex.split(" ".join(words))


def comment(path: Path) -> str:
    """All comment lines before the first key, as one."""
    lines = path.read_text().split("compute_environment")[0].splitlines()
    return " ".join(line.removeprefix("# ") for line in lines)


def launcher_arguments(arguments: Sequence[str]) -> Namespace:
    """What `accelerate launch` makes of its arguments before it starts anything."""
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(list(arguments)))
    args.main_process_port = args.main_process_port or 0  # no fixed port: another job may hold it
    args.deepspeed_fields_from_accelerate_config = ""
    return args


def unknown(config: Any) -> list[str]:
    """Keys of a file's sections that the launcher has no option for; accelerate takes them without a word."""
    options = {action.dest for action in launch_command_parser()._actions}
    return sorted({key for section in (config.fsdp_config, config.deepspeed_config) for key in section} - options)


def changed(folder: Path, name: str, old: str, new: str) -> Path:
    """A copy of a file with one thing changed."""
    text = (FOLDER / f"{name}.yaml").read_text()
    assert old in text
    path = folder / f"{name}.yaml"
    path.write_text(text.replace(old, new))
    return path


def test_every_file_is_known() -> None:
    assert [path.name for path in FILES] == [f"{name}.yaml" for name in EXPECTED]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_accelerate_reads_every_file(path: Path) -> None:
    says, kind, processes, machines, switch = EXPECTED[path.stem]
    assert says in comment(path)
    config = load_config_from_file(str(path))
    assert (config.distributed_type.value, config.num_processes, config.num_machines) == (kind, processes, machines)
    assert config.use_cpu == path.stem.startswith("cpu")
    assert not unknown(config)
    args = launcher_arguments(["--config_file", str(path), "script.py"])
    assert [name for name in ("multi_gpu", "use_fsdp", "use_deepspeed", "tpu", "cpu") if getattr(args, name)] == (
        [switch] if switch else []
    )
    assert (args.num_processes, args.num_machines) == (processes, machines)


def test_unknown_keys_are_found(tmp_path: Path) -> None:
    path = changed(tmp_path, "ddp", "num_processes:", "num_process:")
    with pytest.raises(ValueError, match="unknown keys"):
        load_config_from_file(str(path))
    path = changed(tmp_path, "fsdp2", "fsdp_reshard_after_forward:", "fsdp_reshard:")
    assert unknown(load_config_from_file(str(path))) == ["fsdp_reshard"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_command_of_the_first_lines(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = command(path)
    assert words[:2] == ["accelerate", "launch"]
    args = launcher_arguments(words[2:])
    assert args.config_file == str(path.relative_to(ROOT))
    assert Path(args.training_script).is_file()
    recipe, training = parse((Recipe, TrainingArguments), args.training_script_args)
    assert recipe.train_file == "train.csv"
    assert training.use_cpu == (path.stem == "cpu")
    if args.num_machines > 1:
        assert "--machine_rank" in words
        assert args.main_process_ip == "192.0.2.1", "an address reserved for examples"


@pytest.mark.parametrize("kind", ["SHARDED_STATE_DICT", "FULL_STATE_DICT"])
def test_fsdp2(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kind in (FOLDER / "fsdp2.yaml").read_text()
    path = changed(tmp_path, "fsdp2", "fsdp_state_dict_type: SHARDED_STATE_DICT", f"fsdp_state_dict_type: {kind}")
    if kind == "SHARDED_STATE_DICT":
        assert path.read_text() == (FOLDER / "fsdp2.yaml").read_text(), "sharded unless changed"
    environment = prepare_multi_gpu_env(launcher_arguments(["--config_file", str(path), "script.py"]))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.state_dict_type == StateDictType[kind]
    assert plugin.auto_wrap_policy is transformer_auto_wrap_policy
    assert plugin.transformer_cls_names_to_wrap is None, "accelerate then takes the model's own"
    assert plugin.reshard_after_forward is True
    assert plugin.cpu_ram_efficient_loading is False


@pytest.mark.parametrize("optimizer", [False, True])
def test_deepspeed_leaves_the_optimizer_to_the_trainer(
    optimizer: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = FOLDER / "deepspeed_zero2.yaml"
    if optimizer:  # the control: a DeepSpeed file with an optimizer
        file = tmp_path / "deepspeed.json"
        file.write_text(json.dumps({"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW"}}))
        section = yaml.safe_dump({"deepspeed_config": {"deepspeed_config_file": str(file)}})
        path = changed(tmp_path, "deepspeed_zero2", path.read_text().split("num_processes: 2\n")[1], section)
    _, environment = prepare_deepspeed_cmd_env(launcher_arguments(["--config_file", str(path), "script.py"]))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    plugin = DeepSpeedPlugin()
    assert plugin.zero_stage == 2
    assert ("optimizer" in plugin.deepspeed_config) is optimizer
    if not optimizer:
        assert plugin.gradient_accumulation_steps == plugin.gradient_clipping == "auto"


def test_processes_that_do_not_see_each_other_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = tiny.trainer(tiny.bert(), tiny.arguments(tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "2")
    attach(trainer)  # no launcher of processes: they are some scheduler's
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(PreflightError, match=r"2 processes were started, but the Trainer sees 1.* set use_cpu=True"):
        attach(trainer)
    monkeypatch.setenv("WORLD_SIZE", "1")
    attach(trainer)


@pytest.mark.parametrize("started", [False, True])
def test_ranks_without_a_gpu_take_the_cpu(started: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass
    class Arguments:
        """As TrainingArguments, which would join the other processes."""

        use_cpu: bool = False

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    if started:
        monkeypatch.setenv("LOCAL_RANK", "0")
    assert parse((Arguments,), [])[0].use_cpu is started
    assert parse((Arguments,), ["--use_cpu", "false"])[0].use_cpu is False


def start(*arguments: str) -> subprocess.Popen[str]:
    """`accelerate launch`, where no GPU is seen."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "recipes")])
    return subprocess.Popen(
        [sys.executable, "-m", "accelerate.commands.launch", *arguments],
        env={**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    """What a launch printed, once it has ended."""
    try:
        return process.communicate(timeout=300)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.communicate()[0]


def ranks(folder: Path) -> list[tuple[int, int, int]]:
    """Of each process that was started: its machine, its rank, and how many it knows of, itself among them."""
    found = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    return sorted((one["machine"], one["rank"], one["world_size"]) for one in found)


TOGETHER = [(0, 0, 2), (0, 1, 2)]
CPU2 = ["--config_file", str(FOLDER / "cpu2.yaml"), "--main_process_port", "0"]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("arguments", "options", "expected"),
    [
        pytest.param(CPU2, ["--use_cpu"], TOGETHER, id="cpu2"),
        # What cpu2.yaml is there to avoid. A case that fails here is accelerate getting better: then say so there.
        pytest.param(CPU2, [], [(0, 0, 1), (0, 0, 1)], id="cpu2, script not told: each alone"),
        pytest.param(["--cpu", "--num_processes", "2"], ["--use_cpu"], [(0, 0, 1)], id="flags: one process"),
        pytest.param(["--config_file", "MULTI_CPU"], ["--use_cpu"], [(0, 0, 1)], id="MULTI_CPU: one process"),
    ],
)
def test_what_is_started(arguments: list[str], options: list[str], expected: list[Any], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    other = str(changed(tmp_path, "cpu2", "distributed_type: MULTI_GPU", "distributed_type: MULTI_CPU"))
    arguments = [other if argument == "MULTI_CPU" else argument for argument in arguments]
    process = start(*arguments, str(RANKS), str(tmp_path / "out"), *options)
    log = finish(process)
    assert process.returncode == 0, log
    assert ranks(tmp_path / "out") == expected, log


@pytest.mark.distributed
def test_two_machines_find_each_other(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    here = ["--main_process_ip", "127.0.0.1", "--main_process_port", port]
    config = ["--config_file", str(FOLDER / "multi_node.yaml")]
    machines = [
        start(*config, "--machine_rank", rank, *here, str(RANKS), str(tmp_path), "--use_cpu") for rank in ("0", "1")
    ]
    logs = [finish(process) for process in machines]
    assert [process.returncode for process in machines] == [0, 0], logs
    assert ranks(tmp_path) == [(0, 0, 4), (0, 1, 4), (1, 2, 4), (1, 3, 4)], logs


@pytest.mark.distributed
@pytest.mark.parametrize("rebuild", [True, False])
def test_the_recipe_on_two_ranks(rebuild: bool, model: Path, tmp_path: Path) -> None:
    options = test_text_classification.options(
        model,
        tmp_path,
        use_cpu=None,
        max_steps=None,
        num_train_epochs=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
    )
    config = str(ROOT / "recipes/configs/text_classification/gradual.yaml")
    remedy = "rebuild" if rebuild else "no-rebuild"
    process = start(*CPU2, str(RECIPE), str(tmp_path), remedy, "--config", config, *options)
    log = finish(process)
    if not rebuild:  # the control: the ranks drift apart, and the recipe stops
        assert process.returncode != 0
        assert re.search(r"after step \d+, the weights of `.*` on rank 1 are not those of rank 0", log), log
        return
    assert process.returncode == 0, log
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert one["world_size"] == other["world_size"] == 2
    assert one["steps"] == other["steps"] == 6, "24 rows, 4 a rank, 2 epochs; 12 if each had trained alone"
    moved = [name for name, tensor in one["after"].items() if not tensor.equal(one["before"][name])]
    assert {"classifier.weight", "bert.embeddings.word_embeddings.weight"} <= set(moved)
    assert [name for name, tensor in one["after"].items() if not tensor.equal(other["after"][name])] == []
    assert [path.parent.name for path in tmp_path.rglob("recipe.json")] == ["run"]
    assert json.loads((tmp_path / "run/recipe.json").read_text())["training"]["global_step"] == 6
