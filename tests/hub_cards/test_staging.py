"""What of a run's folder is published, what is not, and what is written anew."""

import errno
import json
import pickle
import shutil
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hub_cards import read_facts
from hub_cards.publishing.own_files import write_own
from hub_cards.publishing.staging import is_allowed, stage
from hub_cards.publishing.validation import check_metadata, check_weights
from hub_cards.scanning.scan import SecretFoundError
from tests.hub_cards import runs, trained
from tests.hub_cards.trained import RUN, Run, go, writes
from tests.hub_server import HubServer

TOKEN = "hf_" + "aBcDeFgHiJkLmNoPqRsTuVwXyZ01234567"
# What transformers' own tokenizers and processors write.
WRITTEN = """
    tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json vocab.txt merges.txt
    spiece.model sentencepiece.bpe.model tokenizer.model spm.model sentencepiece.model tiktoken.model spm_char.model
    source.spm target.spm bpe.codes entity_vocab.json word_shape.json word_pronunciation.json vocab-tgt.json
    vocab-src.json target_vocab.json normalizer.json emoji.json dict.txt byte_maps.json chat_template.jinja
    additional_chat_templates/rag.jinja preprocessor_config.json video_preprocessor_config.json processor_config.json
    audio_tokenizer_config.json
"""
LEFT_OUT = """
    .env training_args.bin optimizer.pt scheduler.pt rng_state.pth pytorch_model.bin vocab.pkl modeling_x.py notes.txt
    trainer_state.json.bak figures/x.svg figures/deep/x.png runs/events checkpoint-3/model.safetensors .git/config
    .eval_results/x.txt sub/tokenizer.json model.onnx data.csv .gitattributes
"""


def put(folder: Path, name: str, content: bytes | str = b"x") -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


# -- the list ---------------------------------------------------------------------------------------------------------


def test_all_that_transformers_writes_beside_weights_is_allowed() -> None:
    assert [name for name in WRITTEN.split() if not is_allowed(name)] == []
    assert [name for name in LEFT_OUT.split() if is_allowed(name)] == []


def test_files_that_are_not_allowed_stay_here(full: Run, tmp_path: Path) -> None:
    for name in (LEFT_OUT + WRITTEN).split():
        if not (full.folder / name).exists():
            put(full.folder, name, "{}")
    staged = stage(full.folder, tmp_path / "staging", read_facts(full.folder))
    assert set(staged.files) & set(LEFT_OUT.split()) == set()
    assert set(WRITTEN.split()) <= set(staged.files)
    assert {".env", "training_args.bin", "optimizer.pt", "checkpoint-3/", "runs/", ".git/"} <= set(staged.left_out)
    assert "figures/x.svg" in staged.left_out


def test_an_adapter_has_no_files_of_a_model(lora: Run, tmp_path: Path) -> None:
    shutil.copy(trained.train("full").folder / "model.safetensors", lora.folder)
    staged = stage(lora.folder, tmp_path / "staging", read_facts(lora.folder))
    assert "adapter_model.safetensors" in staged.files
    assert "model.safetensors" in staged.left_out


def test_weights_are_linked_and_texts_are_copied(full: Run, tmp_path: Path) -> None:
    staged = stage(full.folder, tmp_path / "staging", read_facts(full.folder))
    assert staged.files["model.safetensors"].samefile(full.folder / "model.safetensors")
    assert not staged.files["tokenizer.json"].samefile(full.folder / "tokenizer.json")


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors", "figures"])
def test_a_link_that_leads_out(full: Run, hub: HubServer, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    if name == "figures":
        put(outside, "x.png")
    else:
        shutil.move(full.folder / name, outside)
    (full.folder / name).symlink_to(outside)
    with pytest.raises(ValueError, match="is a link that leads out of the run's folder"):
        go(full)
    assert hub.requests == []


def test_a_link_within_the_folder(full: Run, hub: HubServer) -> None:
    (full.folder / "blobs").mkdir()
    shutil.move(full.folder / "model.safetensors", full.folder / "blobs" / "x")
    (full.folder / "model.safetensors").symlink_to(Path("blobs", "x"))
    go(full)
    assert hub.files(RUN)["model.safetensors"] == (full.folder / "blobs" / "x").read_bytes()


# -- weights ----------------------------------------------------------------------------------------------------------


def test_weights_as_a_pickle(full: Run, hub: HubServer) -> None:
    torch.save(load_file(full.folder / "model.safetensors"), full.folder / "pytorch_model.bin")
    (full.folder / "model.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"pickle `pytorch_model\.bin`.* Call model\.save_pretrained\(run_dir\)"
    ):
        go(full)
    assert hub.requests == []


def test_no_weights(full: Run, hub: HubServer) -> None:
    (full.folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no weights were saved there. Call trainer\.save_model\(\)"):
        go(full)


def test_an_adapter_in_a_folder_of_its_own(lora: Run, hub: HubServer) -> None:
    (lora.folder / "mine").mkdir()
    shutil.move(lora.folder / "adapter_model.safetensors", lora.folder / "mine")
    with pytest.raises(FileNotFoundError, match="lies in its folder `mine`"):
        go(lora)


def test_several_adapters(lora: Run, hub: HubServer) -> None:
    config = json.loads((lora.folder / "adapter_config.json").read_text())
    trained.change(lora.folder / "recipe.json", within="model", adapters={"default": config, "other": config})
    with pytest.raises(ValueError, match="holds the adapters default, other"):
        go(lora)


def cut(data: bytes) -> bytes:
    return data[:-1]


def longer(data: bytes) -> bytes:
    return data + b"\0"


def gap(data: bytes) -> bytes:
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    last = max((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"][0])
    header[last]["data_offsets"] = [place + 8 for place in header[last]["data_offsets"]]
    packed = json.dumps(header).encode()
    return struct.pack("<Q", len(packed)) + packed + data[8 + length :] + bytes(8)


@pytest.mark.parametrize(
    ("spoil", "match"),
    [(cut, "cut short"), (longer, "cut short"), (gap, "is damaged between"), (lambda data: b"", "no safetensors file")],
)
def test_weights_that_are_not_whole(full: Run, hub: HubServer, spoil: Any, match: str) -> None:
    path = full.folder / "model.safetensors"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ValueError, match=match):
        go(full)
    assert writes(hub) == []


def test_shards(full: Run, hub: HubServer) -> None:
    model = trained.BertForSequenceClassification.from_pretrained(full.folder)
    (full.folder / "model.safetensors").unlink()
    model.save_pretrained(full.folder, max_shard_size="4KB")
    go(full)
    shards = [name for name in hub.files(RUN) if name.startswith("model-")]
    assert len(shards) > 1
    (full.folder / shards[0]).unlink()
    with pytest.raises(ValueError, match="which does not hold it"):
        go(full)
    shutil.copy(trained.train("full").folder / "model.safetensors", full.folder)
    with pytest.raises(ValueError, match="remove the one that is of an earlier save"):
        go(full)


# -- configurations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_code_from_the_repository(full: Run, hub: HubServer, name: str) -> None:
    trained.change(full.folder / name, auto_map={"AutoModel": "modeling_x.MyModel"})
    with pytest.raises(ValueError, match=f"`{name}` has `auto_map`"):
        go(full)
    assert writes(hub) == []


def test_no_json(full: Run, hub: HubServer) -> None:
    put(full.folder, "generation_config.json", '{"a": NaN}')
    with pytest.raises(ValueError, match=r"`generation_config\.json` is no JSON \(NaN"):
        go(full)


def test_the_local_base_leaves_the_configurations(full: Run, hub: HubServer, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer_config.json"):
        trained.change(full.folder / name, _name_or_path=str(full.base) + "/", name_or_path=str(full.base))
    go(full)
    files = hub.files(RUN)
    assert "_name_or_path" not in json.loads(files["config.json"])
    assert not hub.ever_saw(str(full.base))
    trained.seed_base(hub, full)
    go(full, base_model=trained.BASE)
    assert json.loads(hub.files(RUN)["tokenizer_config.json"])["name_or_path"] == trained.BASE


def test_any_other_path_is_shown_and_refused(full: Run, hub: HubServer) -> None:
    trained.change(full.folder / "config.json", _name_or_path="/data/models/other")
    line = [number for number, text in enumerate((full.folder / "config.json").read_text().splitlines(), 1)
            if "/data" in text]  # fmt: skip
    with pytest.raises(SecretFoundError, match=rf"config\.json:{line[0]}: absolute path"):
        go(full)
    assert hub.requests == []
    assert go(full, allow=("/data/models/other",)).commit


def test_our_own_files_hold_no_path_and_no_number_that_is_none(full: Run, tmp_path: Path) -> None:
    folder = runs.write(tmp_path / "hand", runs.recipe(), runs.state(best_model_checkpoint="/scratch/jo/checkpoint-3"))
    log = runs.state()["log_history"] + [{"loss": float("nan"), "step": 10}]
    (folder / "trainer_state.json").write_text(json.dumps(runs.state(log_history=log, best_model_checkpoint="/a/b/c")))
    trained.change(folder / "recipe.json", results={"test": {"eval_loss": float("inf"), "eval_f1": 0.5}})
    facts = replace(read_facts(folder), repo_id=RUN)
    (tmp_path / "out").mkdir()
    write_own(folder, tmp_path / "out", facts)
    for path in (tmp_path / "out").iterdir():
        assert "/scratch" not in path.read_text()
        json.loads(path.read_text(), parse_constant=pytest.fail)
    written = read_facts(tmp_path / "out")
    assert [result.metric for result in written.results] == ["f1"]
    assert json.loads((tmp_path / "out" / "training_args.json").read_text())["output_dir"] == "run"


def test_a_path_that_looks_like_a_name_stays_local(tmp_path: Path) -> None:
    found = runs.recipe(model__name_or_path="/models/minilm", model__revision=None)
    found["model"].pop("local")
    found["data"] = {"name": "/data/news"}
    folder = runs.write(tmp_path / "hand", found)
    (tmp_path / "out").mkdir()
    write_own(folder, tmp_path / "out", replace(read_facts(folder), repo_id=RUN))
    written = read_facts(tmp_path / "out")
    assert (written.base.name, written.base.folder) == (None, "minilm")
    assert written.data is not None
    assert (written.data.name, written.data.local) == ("news", True)


# -- secrets ----------------------------------------------------------------------------------------------------------


def _in_json(file: str, within: str | None = None, /, **values: Any) -> Any:
    return lambda run: trained.change(run.folder / file, within=within, **values)


PLANTED = {
    "data set": _in_json("recipe.json", "data", name=f"acme/{TOKEN}", local=False),
    "label": _in_json("recipe.json", "model", id2label={"0": TOKEN, "1": "b", "2": "c"}),
    "base": _in_json("recipe.json", "model", name_or_path=f"acme/{TOKEN}", local=False),
    "command": _in_json("recipe.json", command=["python", "x.py", "--key", TOKEN]),
    "tokenizer_config": _in_json("tokenizer_config.json", auth=TOKEN),
    "adapter_config": _in_json("adapter_config.json", note=f"/home/jo/{TOKEN}"),
    "trainer_state": _in_json("trainer_state.json", trial_params={"key": TOKEN}),
    "chat template": lambda run: put(run.folder, "chat_template.jinja", f"{{# {TOKEN} #}}"),
    "card": lambda run: put(run.folder, "README.md", f"---\nlicense: mit\n---\n# Mine\n\n{TOKEN}\n"),
    "picture": lambda run: put(run.folder, "figures/mine.png", _picture(f"Comment\0{TOKEN}")),
    "licence file": lambda run: put(run.folder, "LICENSE", f"mine {TOKEN}"),
    "weights' header": lambda run: _header(run.folder / "adapter_model.safetensors"),
}


def _picture(text: str) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"\0\0"))
    return b"\x89PNG\r\n\x1a\n" + size + chunk(b"tEXt", text.encode()) + pixels + chunk(b"IEND", b"")


def _header(path: Path) -> None:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.dumps({**json.loads(data[8 : 8 + length]), "__metadata__": {"key": TOKEN}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])


@pytest.mark.parametrize("where", PLANTED)
def test_a_planted_token_never_arrives(lora: Run, hub: HubServer, where: str) -> None:
    PLANTED[where](lora)
    with pytest.raises(SecretFoundError, match="Hugging Face token") as caught:
        go(lora)
    assert TOKEN not in str(caught.value)
    assert not hub.ever_saw(TOKEN)
    assert hub.requests == []


@pytest.mark.parametrize("option", ["commit_message", "license", "base_model", "base_revision"])
def test_a_token_in_an_argument(lora: Run, hub: HubServer, option: str) -> None:
    with pytest.raises(SecretFoundError, match="Hugging Face token"):
        go(lora, **{option: TOKEN})
    assert hub.requests == []


def test_files_with_secrets_that_are_left_out(lora: Run, hub: HubServer) -> None:
    put(lora.folder, ".env", f"HF_TOKEN={TOKEN}")
    put(lora.folder, "training_args.bin", pickle.dumps({"hub_token": TOKEN}))
    put(lora.folder, "runs/events.out", TOKEN)
    put(lora.folder, "checkpoint-3/trainer_state.json", TOKEN)
    go(lora)
    assert not hub.ever_saw(TOKEN)
    assert hub.ever_saw("adapter_config.json")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "vocab.txt", "tokenizer.model"])
def test_a_pickle_under_any_name(lora: Run, hub: HubServer, name: str) -> None:
    put(lora.folder, name, pickle.dumps({"weights": list(range(300))}))
    with pytest.raises(ValueError, match="pickle"):
        go(lora, allow=("pickle",))
    assert writes(hub) == []
    assert RUN not in hub.repos


def test_a_pickle_is_known_by_its_bytes(tmp_path: Path) -> None:
    put(tmp_path, "vocab.txt", pickle.dumps({}))
    torch.save({}, tmp_path / "tokenizer.model")
    for name in ("vocab.txt", "tokenizer.model"):
        with pytest.raises(ValueError, match=f"`{name}` is a pickle"):
            check_weights({name: tmp_path / name})


def test_what_the_hub_adds_to_the_card_is_scanned(lora: Run, hub: HubServer) -> None:
    trained.seed_base(hub, lora, card=f"---\nlicense: other\nlicense_name: {TOKEN}\n---\n")
    with pytest.raises(SecretFoundError, match="Hugging Face token"):
        go(lora.on_hub())
    assert writes(hub) == []
    hub.seed(RUN, {"README.md": f"---\nlicense: mit\n---\n# Mine\n\n{TOKEN}\n"}, private=True, user="alice")
    trained.seed_base(hub, lora)
    with pytest.raises(SecretFoundError, match=r"README\.md:\d+: Hugging Face token"):
        go(lora)
    assert writes(hub) == []


# -- the card ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("front", "match"),
    [
        ("base_model: /models/x", "`base_model` .* is '/models/x'; expected a model's id"),
        ("datasets: [a b]", "`datasets`"),
        ("tags: one", "expected a list of strings"),
        ("license: [mit]", "`license` .* expected a string"),
        ("language: english", "an ISO 639 code"),
        ("base_model_relation: child", "one of adapter, finetune"),
        ("model-index: x", "`model-index`"),
        ("widget: x", "`widget`"),
        ("co2_eq_emissions: .nan", "finite numbers"),
        ("a: [", "are no YAML"),
        ("- a", "are a list"),
    ],
)
def test_metadata_that_the_hub_refuses(front: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        check_metadata(f"---\n{front}\n---\n")


def test_a_card_without_metadata() -> None:
    with pytest.raises(ValueError, match="has no metadata"):
        check_metadata("# A model\n")


def test_what_somebody_added_to_the_card_is_checked(full: Run, hub: HubServer) -> None:
    put(full.folder, "README.md", "---\nlanguage: klingon-and-more\n---\n# Mine\n")
    with pytest.raises(ValueError, match="an ISO 639 code"):
        go(full)
    assert writes(hub) == []


@pytest.mark.parametrize("shown", ["![a](figures/mine.png)", '<img src="./figures/mine.png">'])
def test_pictures_have_to_be_there(full: Run, hub: HubServer, shown: str) -> None:
    put(full.folder, "README.md", f"---\nlicense: mit\n---\n# Mine\n\n## Pictures\n\n{shown}\n")
    with pytest.raises(ValueError, match=r"shows `figures/mine\.png`, which is not published"):
        go(full)
    put(full.folder, "figures/mine.png", _picture("Comment\0mine"))
    assert "figures/mine.png" in go(full).files


def test_the_disk_is_full(full: Run, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", fail)
        with pytest.raises(OSError, match=r"do not fit on the disk .* nothing was sent"):
            go(full)
    assert hub.requests == []
    assert not list(full.folder.glob(".publishing-*"))
    assert go(full).commit
