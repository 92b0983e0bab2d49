"""Where the reference lives: the same values, in memory, in another dtype, or mapped from the checkpoint's files."""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForPreTraining,
    BertForSequenceClassification,
    BertLMHeadModel,
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPT2Model,
    PreTrainedModel,
    VisionEncoderDecoderModel,
    ViTModel,
)

from tests import tiny
from tests.families import FAMILIES
from tests.launching import launch
from tl_callbacks import NoEffectWarning, WeightAnchoring, attach, group_layers
from tl_callbacks.anchoring import Reference
from tl_callbacks.anchoring.reference.mapped import same_bits
from tl_callbacks.parameters import parameters_by_name

GPT2 = GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=50, n_positions=16, pad_token_id=0)


def body(folder: Path, **saving: Any) -> BertConfig:
    """Save a BertModel; return the config of its classifiers."""
    model = tiny.bert().bert
    model.save_pretrained(folder, **saving)
    return tiny.bert().config


def body_names(model: nn.Module) -> list[str]:
    groups = group_layers(model)
    return [name for group in groups if group.name != groups.head for name in group.parameters]


def taken(model: nn.Module, names: Iterable[str] | None = None, **options: Any) -> Reference:
    return Reference.take(model, body_names(model) if names is None else names, **options)


def unequal(reference: Reference, model: nn.Module) -> list[str]:
    """Names whose values are not those of the model's parameters, bit for bit, after a cast to their dtype."""
    parameters = parameters_by_name(model)
    assert reference.tensors
    return [name for name, tensor in reference.tensors.items() if not same_bits(parameters[name], tensor)]


def came_from(reference: Reference) -> dict[str, Path]:
    """The file that each mapped tensor lies in."""
    assert reference._files is not None
    return {name: reference._files._file[key] for name, key in reference.mapped.items()}


# A model that from_pretrained loads from a folder, and how many of its anchored tensors are not mapped.
def bert_from_body(folder: Path) -> PreTrainedModel:
    body(folder)
    return BertForSequenceClassification.from_pretrained(folder)


def body_from_bert(folder: Path) -> PreTrainedModel:
    BertForPreTraining(tiny.bert().config).save_pretrained(folder)
    return BertModel.from_pretrained(folder)


def sharded(folder: Path) -> PreTrainedModel:
    body(folder, max_shard_size="10KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return BertForSequenceClassification.from_pretrained(folder)


def tied(folder: Path) -> PreTrainedModel:
    GPT2LMHeadModel(GPT2).save_pretrained(folder)
    return GPT2LMHeadModel.from_pretrained(folder)


def classifier_of_gpt2(folder: Path) -> PreTrainedModel:
    GPT2Model(GPT2).save_pretrained(folder)
    return GPT2ForSequenceClassification.from_pretrained(folder)


def bfloat16(folder: Path) -> PreTrainedModel:
    body(folder)
    return BertForSequenceClassification.from_pretrained(folder, dtype=torch.bfloat16)


def from_bfloat16(folder: Path) -> PreTrainedModel:
    tiny.bert().to(torch.bfloat16).save_pretrained(folder)
    return BertForSequenceClassification.from_pretrained(folder, dtype=torch.float32)


def family(name: str) -> Callable[[Path], PreTrainedModel]:
    def load(folder: Path) -> PreTrainedModel:
        torch.manual_seed(0)
        model = FAMILIES[name].build()
        model.save_pretrained(folder)
        return type(model).from_pretrained(folder)

    return load


def two_checkpoints(folder: Path) -> PreTrainedModel:
    ViTModel(FAMILIES["ViT"].build().config).save_pretrained(folder / "encoder")
    text = BertLMHeadModel(
        BertConfig(**tiny.bert().config.to_diff_dict() | {"is_decoder": True, "add_cross_attention": True})
    )
    text.save_pretrained(folder / "text")
    return VisionEncoderDecoderModel.from_encoder_decoder_pretrained(folder / "encoder", folder / "text")


LOADED = {
    "classifier from a body": bert_from_body, "body from a pretraining model": body_from_bert, "sharded": sharded,
    "tied": tied, "classifier of GPT-2": classifier_of_gpt2, "bfloat16": bfloat16, "from bfloat16": from_bfloat16,
    "two checkpoints": two_checkpoints,
    **{name: family(name) for name in ("ViT", "Swin", "DINOv2", "SegFormer", "T5", "GPT-NeoX")},
}  # fmt: skip


@pytest.mark.parametrize("name", LOADED)
def test_all_of_the_body_is_mapped_and_no_bit_differs(name: str, tmp_path: Path) -> None:
    model = LOADED[name](tmp_path)
    reference = taken(model, source="checkpoint")
    assert reference.copied == {}
    assert set(reference.mapped) == set(reference.tensors) == set(body_names(model))
    assert unequal(reference, model) == []
    assert reference.fingerprint == taken(model).fingerprint
    files = list(tmp_path.rglob("*.safetensors"))
    with torch.no_grad():  # training writes neither into the file nor into the reference
        for parameter in model.parameters():
            parameter += 1
    assert set(unequal(reference, model)) == set(reference.tensors)
    assert all(file.exists() for file in files)
    reference.check()


def test_what_loading_merges_is_copied_and_the_reference_says_so(tmp_path: Path) -> None:
    model = family("Mixtral")(tmp_path)
    reference = taken(model, source="checkpoint")
    assert unequal(reference, model) == []
    assert reference.copied
    assert all("experts" in name for name in reference.copied)
    assert len(reference.mapped) + len(reference.copied) == len(reference.tensors)
    count, total = len(reference.copied), len(reference.tensors)
    assert f"; {count} of {total} are copied, as they are not in the file under their names (new, or" in (
        reference.summary()
    )
    assert reference.facts()["copied"] == {
        "they are not in the file under their names (new, or converted when they were loaded)": count
    }


def test_new_and_changed_tensors_are_copied(tmp_path: Path) -> None:
    model = bert_from_body(tmp_path)
    with torch.no_grad():
        model.bert.encoder.layer[2].output.dense.weight.zero_()
        model.resize_token_embeddings(60)
    reference = taken(model, parameters_by_name(model), source="checkpoint")
    assert unequal(reference, model) == []
    assert reference.copied == {
        "bert.embeddings.word_embeddings.weight": "have another shape in the file",
        "bert.encoder.layer.2.output.dense.weight": "have other values in the file",
        "classifier.weight": "are not in the file under their names (new, or converted when they were loaded)",
    } | ({} if "classifier.bias" in reference.mapped else {"classifier.bias": reference.copied["classifier.bias"]})


def test_one_bit_is_enough_to_copy(tmp_path: Path) -> None:
    model = bert_from_body(tmp_path)
    last = model.bert.encoder.layer[1].output.dense.weight  # in its last element, after those that the search reads
    with torch.no_grad():
        last[-1, -1] = torch.nextafter(last[-1, -1], torch.tensor(9.0))
    reference = taken(model, source="checkpoint")
    assert list(reference.copied) == ["bert.encoder.layer.1.output.dense.weight"]
    assert unequal(reference, model) == []


def test_a_file_changed_after_loading_is_not_the_reference(tmp_path: Path) -> None:
    model = bert_from_body(tmp_path)
    tiny.bert(seed=5).bert.save_pretrained(tmp_path)
    reference = taken(model, source="checkpoint")
    assert "bert.encoder.layer.0.output.dense.weight" in reference.copied
    assert unequal(reference, model) == []
    assert reference.fingerprint == taken(model).fingerprint


def test_files_of_another_model_alone_map_nothing_and_say_so(tmp_path: Path) -> None:
    model = bert_from_body(tmp_path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1
    with pytest.warns(NoEffectWarning, match=r"55 of 55 are copied, as they have other values in the file.*Nothing is"):
        reference = taken(model, source="checkpoint")
    assert unequal(reference, model) == []


@pytest.mark.parametrize("form", ["decoupled", "penalty"])
@pytest.mark.parametrize("load", ["classifier from a body", "bfloat16"])
def test_a_mapped_reference_trains_as_one_in_memory(load: str, form: Any, tmp_path: Path) -> None:
    def run(reference: Any, folder: str, strength: float) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = LOADED[load](tmp_path / folder)
        anchor = WeightAnchoring(strength, form=form, reference=reference)
        trainer = tiny.trainer(model, tiny.arguments(tmp_path, learning_rate=0.1), callbacks=[anchor])
        attach(trainer)
        trainer.train()
        return tiny.state(model)

    memory, mapped, weaker = run(None, "a", 0.3), run("checkpoint", "b", 0.3), run("checkpoint", "c", 0.01)
    assert not tiny.moved(memory, mapped)
    assert tiny.moved(memory, weaker)


def anonymous(tensors: Iterable[torch.Tensor]) -> list[tuple[str, int]]:
    """The file that backs each tensor's memory, "" if none, and how many kilobytes of it are the process's own."""
    mappings: list[list[Any]] = []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \S+ *(.*)", line):
            mappings.append([int(match[1], 16), int(match[2], 16), match[3], 0])
        elif line.startswith("Anonymous:"):
            mappings[-1][3] = int(line.split()[1])
    holding = [next(m for m in mappings if m[0] <= tensor.data_ptr() < m[1]) for tensor in tensors]
    return [(file, own) for _, _, file, own in holding]


def test_a_mapped_reference_takes_no_memory_and_one_in_memory_does(tmp_path: Path) -> None:
    found = {}
    for way, source in (("mapped", "checkpoint"), ("copied", None)):
        torch.manual_seed(0)
        model = bert_from_body(tmp_path / "pretrained")
        anchor = WeightAnchoring(0.1, reference=source)  # type: ignore[arg-type]
        args = tiny.arguments(tmp_path, eval_strategy="steps", eval_steps=4)
        trainer = tiny.trainer(model, args, callbacks=[anchor])
        attach(trainer)
        trainer.train()
        assert max(anchor.distances(model).values()) > 0
        found[way] = anonymous(anchor._placed.values())
    assert set(found["mapped"]) == {(str(tmp_path / "pretrained" / "model.safetensors"), 0)}
    assert all(not file.endswith(".safetensors") and own > 0 for file, own in found["copied"])


@pytest.mark.parametrize("options", [{"dtype": torch.bfloat16}, {"device": "cpu"}, {}, {"dtype": torch.float64}])
def test_copies_live_where_they_are_asked_to(options: dict[str, Any]) -> None:
    model = tiny.bert()
    reference = taken(model, **options)
    parameters = parameters_by_name(model)
    for name, tensor in reference.placed(model).items():
        assert tensor.dtype == options.get("dtype", torch.float32)
        assert torch.equal(tensor, parameters[name].to(tensor.dtype))
        assert tensor.data_ptr() != parameters[name].data_ptr()
    assert reference.fingerprint == taken(model).fingerprint
    assert reference.fingerprint == taken(model, source=tiny.state(model), **options).fingerprint
    assert reference.fingerprint != taken(tiny.bert(seed=3), **options).fingerprint


def test_a_low_precision_model_that_trains_in_a_high_one_keeps_its_first_values(tmp_path: Path) -> None:
    # As accelerate does with FSDP2 in mixed precision. The file's values are not those that were loaded.
    model = bfloat16(tmp_path)
    reference = taken(model, source="checkpoint")
    rounded = tiny.state(model)
    placed = reference.placed(model.float())
    assert all(torch.equal(tensor.float(), rounded[name].float()) for name, tensor in placed.items())
    name = "bert.encoder.layer.0.output.dense.weight"
    assert not torch.equal(reference.tensors[name], rounded[name].float())


def test_the_hubs_cache_is_searched_for_the_commit_that_was_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    snapshots = tmp_path / "models--jo--tiny" / "snapshots"
    tiny.bert(seed=5).bert.save_pretrained(snapshots / ("a" * 40))
    loaded = bert_from_body(snapshots / ("b" * 40))
    loaded.config._name_or_path = "jo/tiny"
    reference = taken(loaded, source="checkpoint")
    assert reference.copied == {}
    assert unequal(reference, loaded) == []
    commits = {name: "a" if "a" * 40 in str(file) else "b" for name, file in came_from(reference).items()}
    other = parameters_by_name(tiny.bert(seed=5))
    differing = {name for name in commits if not torch.equal(other[name], parameters_by_name(loaded)[name])}
    assert {name for name in differing if "dense.weight" in name}
    assert {commits[name] for name in differing} == {"b"}
    loaded.config._name_or_path = "jo/other"
    with pytest.raises(ValueError, match=r"no \.safetensors file of `jo/other` is in a local folder or in the cache"):
        taken(loaded, source="checkpoint")


def test_adapters_are_copied_and_what_they_keep_of_the_base_is_mapped(tmp_path: Path) -> None:
    model = get_peft_model(
        bert_from_body(tmp_path), LoraConfig(task_type="SEQ_CLS", target_modules=["query"], modules_to_save=["pooler"])
    )
    names = [name for name in parameters_by_name(model) if "pooler" in name or "lora_" in name or "query" in name]
    reference = taken(model, names, source="checkpoint")
    assert unequal(reference, model) == []
    assert {name for name in reference.copied if "lora_A" in name}
    assert all("lora_" in name for name in reference.copied)
    with pytest.warns(NoEffectWarning, match="Nothing is mapped"):
        taken(model, [name for name in names if "lora_A" in name], source="checkpoint")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"source": "checkpoint"}, 'the reference is "checkpoint", and the Bert.* names none; .*in memory'),
        ({"source": "file"}, "the reference is 'file'; expected None"),
        ({"source": "checkpoint", "dtype": torch.bfloat16}, "with a dtype or a device; expected neither"),
        ({"source": {}}, "the reference lacks `bert"),
    ],
)
def test_bad_sources_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        taken(tiny.bert(), **options)


def test_facts_are_json(tmp_path: Path) -> None:
    for model, options in ((tiny.bert(), {"dtype": torch.bfloat16, "device": "cpu"}), (sharded(tmp_path), {})):
        facts = taken(model, source="checkpoint" if not options else None, **options).facts()
        assert json.loads(json.dumps(facts)) == facts
    assert facts["kind"] == "checkpoint"
    assert facts["mapped"] == facts["tensors"] == 55
    assert "model-00001-of" in facts["files"][0]


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [2, 4])
def test_each_rank_has_its_part_of_the_first_ranks_reference(ranks: int, tmp_path: Path) -> None:
    body(tmp_path / "pretrained")
    worker = str(Path(__file__).with_name("reference_worker.py"))
    status = launch(worker, str(tmp_path / "pretrained"), ranks=ranks, log=tmp_path / "log", seconds=300)
    assert status == 0, (tmp_path / "log").read_text()[-4000:]
