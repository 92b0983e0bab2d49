"""The wheel: what is in it, and that the README's lines run from it and not from the checkout."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

SCRIPT = """
import tempfile
from pathlib import Path
import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
import tl_callbacks
assert Path(tl_callbacks.__file__).is_relative_to(Path({folder!r})), tl_callbacks.__file__
config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16)
model = BertForSequenceClassification(config)
args = TrainingArguments(tempfile.mkdtemp(), max_steps=12, use_cpu=True, report_to="none", save_strategy="no")
train = [dict(input_ids=[n, n + 1, n + 2], labels=n % 2) for n in range(40)]
"""


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_the_readmes_lines_run_from_it(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"tl_callbacks/__init__.py", "tl_callbacks/py.typed", "hub_cards/run.schema.json"} <= set(names)
    assert {name.split("/")[0] for name in names} == {
        "hub_cards",
        "tl_callbacks",
        wheel.name.rsplit("-", 3)[0] + ".dist-info",
    }
    target = tmp_path / "installed"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(install, check=True)
    lines = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    environment = {**os.environ, "PYTHONPATH": str(target), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    script = SCRIPT.format(folder=str(target)) + lines
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, env=environment, capture_output=True)
