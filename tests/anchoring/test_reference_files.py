"""What happens to a mapped reference when its files are touched, written to, replaced or cannot be read."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from transformers import BertForSequenceClassification, TrainerCallback

from tests import tiny
from tests.anchoring.test_reference import bert_from_body, body, taken, unequal
from tl_callbacks import NoEffectWarning, WeightAnchoring, WeightInterpolation, attach
from tl_callbacks.anchoring.reference.mapped import same_bits


def overwrite(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.seek(-4, os.SEEK_END)
        opened.write(b"\x00\x00\x00\x41")


def test_a_file_written_in_place_is_refused_and_one_replaced_is_not(tmp_path: Path) -> None:
    model = bert_from_body(tmp_path)
    before = tiny.state(model)
    reference = taken(model, source="checkpoint")
    file = tmp_path / "model.safetensors"
    tiny.bert(seed=5).bert.save_pretrained(tmp_path)  # beside the old one, and moved into its place
    reference.check()
    assert not [name for name, tensor in reference.tensors.items() if not same_bits(before[name], tensor)]
    file.unlink()
    reference.check()
    body(tmp_path)
    reference = taken(BertForSequenceClassification.from_pretrained(tmp_path), source="checkpoint")
    overwrite(file)
    with pytest.raises(RuntimeError, match="which holds the reference, was written to after the Trainer was made"):
        reference.check()


def test_training_stops_when_the_file_is_written_to(tmp_path: Path) -> None:
    model = bert_from_body(tmp_path / "pretrained")
    trainer = tiny.trainer(model, tiny.arguments(tmp_path), callbacks=[WeightAnchoring(0.1, reference="checkpoint")])
    attach(trainer)
    trainer.train()
    overwrite(tmp_path / "pretrained" / "model.safetensors")
    with pytest.raises(RuntimeError, match="Load the pretrained model again"):
        trainer.train()


def test_a_file_that_is_only_touched_is_the_reference_still(tmp_path: Path) -> None:
    model = bert_from_body(tmp_path)
    reference, file = taken(model, source="checkpoint"), tmp_path / "model.safetensors"
    assert reference._files is not None
    for number in range(2):
        os.utime(file, ns=(number, number))
        reference.check()
    reference._files.check(lambda name: pytest.fail("it was read again, with nothing written since"))
    assert len(reference.tensors) == 55
    overwrite(file)
    with pytest.raises(RuntimeError, match="was written to after"):
        reference.check()


def test_a_file_that_became_shorter_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    model = bert_from_body(tmp_path / "pretrained")
    anchor = WeightAnchoring(0.1, reference="checkpoint")
    attach(tiny.trainer(model, tiny.arguments(tmp_path), callbacks=[anchor]))
    assert set(anchor.distances(model).values()) == {0.0}
    file = tmp_path / "pretrained" / "model.safetensors"
    os.truncate(file, file.stat().st_size - 4)
    with pytest.raises(RuntimeError, match="was written to after the Trainer was made"):
        anchor.distances(model)


def test_an_interpolation_whose_reference_is_lost_leaves_the_tuned_weights(tmp_path: Path) -> None:
    plain, model = bert_from_body(tmp_path / "a"), bert_from_body(tmp_path / "b")
    plain.classifier.load_state_dict(model.classifier.state_dict())
    for tuned, callbacks in ((plain, []), (model, [WeightInterpolation([0.0], reference="checkpoint")])):
        trainer = tiny.trainer(tuned, tiny.arguments(tmp_path), callbacks=callbacks)
        attach(trainer)
        if not callbacks:
            trainer.train()
            continue
        trainer.add_callback(_Overwriting(tmp_path / "b" / "model.safetensors"))
        with pytest.warns(NoEffectWarning, match=r"was written to .* The model keeps its tuned weights"):
            trainer.train()
    assert not tiny.moved(tiny.state(plain), tiny.state(model))


class _Overwriting(TrainerCallback):  # type: ignore[misc]
    def __init__(self, file: Path) -> None:
        self.file = file

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        overwrite(self.file)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:abc"])
def test_a_file_that_cannot_be_read_is_left_out_and_named(content: bytes, tmp_path: Path) -> None:
    model = bert_from_body(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(content)
    reference = taken(model, source="checkpoint")
    assert reference.copied == {}
    assert unequal(reference, model) == []
    assert f"; `{tmp_path / 'a.safetensors'}` is left out, as it cannot be read (" in reference.summary()
    facts = reference.facts()
    assert list(facts["left_out"]) == ["a.safetensors"]
    assert facts["files"] == ["model.safetensors"]
    assert json.loads(json.dumps(facts)) == facts
    (tmp_path / "model.safetensors").unlink()  # the model itself may be mapped from it
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.warns(NoEffectWarning, match=r"`.*model\.safetensors` is left out.* Nothing is mapped"):
        reference = taken(model, source="checkpoint")
    assert unequal(reference, model) == []
