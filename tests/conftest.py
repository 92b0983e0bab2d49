"""One thread, no network but a Hub of our own, fixed seeds: before torch is imported."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from tests import hub_session  # first: the clients read their environment when they are imported

# isort: split
from collections.abc import Iterator
from pathlib import Path

import datasets
import huggingface_hub
import pytest
import torch

from tests import timm_beside
from tests.hub_server import HubServer

hub_session.guard_sockets()
timm_beside.make_importable()  # before transformers is imported, which looks for timm once
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _loopback_only() -> Iterator[None]:
    hub_session.ESCAPES.clear()
    yield
    assert not hub_session.ESCAPES, f"this test reached for the network: {sorted(set(hub_session.ESCAPES))}"


# The clients read HF_ENDPOINT once, at import, but whether they are offline at each call. So the suite has one Hub for
# its whole life and is offline (nothing asks it about local paths); a test with this fixture is online, with an empty
# Hub, a clean cache and alice, of the organisation acme, logged in. Subprocesses inherit all of it from os.environ.
@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    home = tmp_path / "hf-home"
    online = hub_session.HUB.start()
    online.reset()
    token = online.add_user("alice", orgs=("acme",))
    for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_XET_CACHE", "HF_DATASETS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.setenv("HF_TOKEN", token)
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.setattr(constants, name, str(home / "hub"))
    for name, path in (("HF_HOME", home), ("HF_XET_CACHE", home / "xet"), ("HF_ASSETS_CACHE", home / "assets")):
        monkeypatch.setattr(constants, name, str(path))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "USE_PARQUET_EXPORT", False)  # it lives at another host, datasets-server
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "datasets")
    monkeypatch.setattr("transformers.utils.hub.HF_MODULES_CACHE", str(home / "modules"))
    yield online
    huggingface_hub.close_session()
    assert not online.errors, "\n".join(online.errors)
