"""Several adapters in one model: each as if it were alone; and merged, with the head that was asked for."""

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

from hub_cards.pulling.pull import pull
from hub_cards.registry.adapter_set import AdapterSet, load_adapters
from hub_cards.registry.combining import merge_adapters
from hub_cards.registry.heads import Head, averaged, united
from hub_cards.registry.sharing import configs
from tests.hub_cards.adapter_repos import (
    INPUTS,
    inputs_for,
    logits,
    publish_adapter,
    seed_base,
)
from tests.hub_server import HubServer

NEWS, MAIL = ("bad", "fair", "good"), ("good", "bad")


@pytest.fixture(scope="module")
def kept() -> dict[str, AdapterSet]:
    return {}


@pytest.fixture
def two(hub: HubServer, tmp_path: Path, kept: dict[str, AdapterSet]) -> AdapterSet:
    """What `two_on_hub` gives, loaded once and copied: the Hub of a later test does not have it."""
    if not kept:
        kept["two"] = load_two(hub, tmp_path)
    return copy.deepcopy(kept["two"])


@pytest.fixture
def two_on_hub(hub: HubServer, tmp_path: Path) -> AdapterSet:
    return load_two(hub, tmp_path)


def load_two(hub: HubServer, tmp_path: Path) -> AdapterSet:
    """News and mail: other labels, ranks, scales and targets."""
    seed_base(hub, tmp_path / "base")
    publish_adapter(hub, tmp_path / "news", "acme/news", NEWS)
    publish_adapter(
        hub, tmp_path / "mail", "jo/mail", MAIL, seed=2, r=3, target_modules=["key", "value"], use_rslora=True,
        layers_to_transform=[1, 2],
    )  # fmt: skip
    return load_adapters({"news": "acme/news", "mail": "jo/mail"})


def deltas(model: Any, name: str) -> dict[str, torch.Tensor]:
    """By hand: what an adapter adds to the weights of each layer."""
    state, config = (
        peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False),
        configs(model),
    )
    scale = config[name].lora_alpha / (config[name].r ** 0.5 if config[name].use_rslora else config[name].r)
    return {
        key.removesuffix(".lora_A.weight"): scale * state[key.replace("lora_A", "lora_B")].double() @ factor.double()
        for key, factor in state.items()
        if key.endswith("lora_A.weight")
    }


def test_each_adapter_says_what_it_says_alone_bit_for_bit(hub: HubServer, tmp_path: Path) -> None:
    seed_base(hub, tmp_path / "base")
    made = {
        "news": publish_adapter(hub, tmp_path / "a", "acme/news", NEWS),
        "mail": publish_adapter(hub, tmp_path / "b", "acme/mail", MAIL, seed=2, r=4, target_modules=["key"]),
        "stars": publish_adapter(hub, tmp_path / "c", "jo/stars", ("stars",), seed=3, problem_type="regression"),
        "tags": publish_adapter(
            hub, tmp_path / "d", "jo/tags", ("x", "y", "z", "w"), seed=4, problem_type="multi_label_classification"
        ),
        "dora": publish_adapter(hub, tmp_path / "e", "jo/dora", NEWS, seed=5, use_dora=True, init_lora_weights=True),
        "heads": publish_adapter(hub, tmp_path / "f", "jo/heads", NEWS, modules_to_save=["pooler", "classifier"]),
    }
    adapters = load_adapters([one.repo_id for one in made.values()])
    assert adapters.names == tuple(made)
    assert adapters.active == "news"
    for name in ["mail", "heads", *made, "news"]:
        adapters.use(name)
        alone = pull(made[name].repo_id)
        base, single = adapters.model.get_base_model(), alone.model.get_base_model()  # type: ignore[operator]
        assert torch.equal(logits(adapters.model), made[name].logits), name
        assert torch.equal(logits(alone.model), made[name].logits)
        assert adapters.labels == alone.labels
        for key in ("num_labels", "id2label", "label2id", "problem_type"):
            assert getattr(base.config, key) == getattr(single.config, key), (name, key)
        labels = torch.ones(8, 4) if name == "tags" else torch.ones(8) if name == "stars" else torch.ones(8).long()
        losses = [model(**INPUTS, labels=labels).loss for model in (adapters.model, alone.model)]
        assert torch.equal(*losses)
    assert not torch.equal(made["news"].logits, made["heads"].logits), "the control"
    assert not any(parameter.requires_grad for parameter in adapters.model.parameters())
    with pytest.raises(ValueError, match="there is no adapter `spam`; expected one of: news, mail, stars"):
        adapters.use("spam")


@pytest.mark.parametrize(
    "config",
    [
        peft.IA3Config(task_type="SEQ_CLS", target_modules=["key"], feedforward_modules=[], init_ia3_weights=False),
        peft.VeraConfig(task_type="SEQ_CLS", target_modules=["query"], r=2, init_weights=False),
        peft.LoHaConfig(task_type="SEQ_CLS", target_modules=["query"], r=2, init_weights=False),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_other_kinds_are_swapped_too_but_not_merged(hub: HubServer, tmp_path: Path, config: Any) -> None:
    seed_base(hub, tmp_path / "base")
    made = [publish_adapter(hub, tmp_path / n, f"jo/{n}", NEWS, adapter=config, seed=i) for i, n in enumerate("yz")]
    adapters = load_adapters([one.repo_id for one in made])
    for one in reversed(made):
        adapters.use(one.repo_id[-1])
        assert torch.equal(logits(adapters.model), one.logits)
    with pytest.raises(
        ValueError, match=f"`y` is of the kind {config.peft_type.value}, whose sum .* expected plain LORA"
    ):
        merge_adapters(adapters, head="y")


@pytest.mark.parametrize("kind", ["roberta", "llama", "vit", "resnet"])
def test_models_and_heads_of_other_forms(hub: HubServer, tmp_path: Path, kind: str) -> None:
    seed_base(hub, tmp_path / "base", kind)
    inputs = inputs_for(kind)
    made = [
        publish_adapter(hub, tmp_path / "a", "jo/one", NEWS, kind=kind),
        publish_adapter(hub, tmp_path / "b", "jo/two", NEWS[::-1], kind=kind, seed=2, r=3),
        publish_adapter(hub, tmp_path / "c", "jo/three", MAIL, kind=kind, seed=3),
    ]
    adapters = load_adapters([one.repo_id for one in made])
    for one in made:
        adapters.use(one.repo_id.rpartition("/")[2])
        assert torch.equal(logits(adapters.model, inputs), one.logits)
    merge_adapters(adapters, {"one": 0, "two": 1}, head="average", name="second")
    torch.testing.assert_close(logits(adapters.model, inputs), made[1].logits.flip(1), atol=1e-6, rtol=0)
    merge_adapters(adapters, {"one": 0, "three": 1}, head="three", name="third")
    torch.testing.assert_close(logits(adapters.model, inputs), made[2].logits, atol=1e-6, rtol=0)
    if kind in ("roberta", "resnet"):
        layer = "dense.bias" if kind == "roberta" else "normalization.bias"
        with pytest.raises(ValueError, match=rf"below .* of `one` and `three` differ \(`.*{layer}`, .*rows"):
            merge_adapters(adapters, {"one": 1, "three": 0}, head="union", name="wide")
    else:
        merge_adapters(adapters, {"one": 1, "three": 0}, head="union", name="wide")
        torch.testing.assert_close(logits(adapters.model, inputs), made[0].logits, atol=1e-6, rtol=0)


def test_the_precision_of_training_is_kept(hub: HubServer, tmp_path: Path) -> None:
    seed_base(hub, tmp_path / "base")
    half = {"dtype": torch.bfloat16}
    made = [publish_adapter(hub, tmp_path / n, f"jo/{n}", NEWS, config=half, seed=i) for i, n in enumerate("yz")]
    adapters = load_adapters([one.repo_id for one in made])
    for one in reversed(made):
        adapters.use(one.repo_id[-1])
        assert torch.equal(logits(adapters.model), one.logits)
    merge_adapters(adapters, [1, 0], head="average")
    torch.testing.assert_close(logits(adapters.model), made[0].logits, atol=0.02, rtol=0)
    publish_adapter(hub, tmp_path / "full", "jo/full", NEWS)
    with pytest.raises(ValueError, match=r"the configurations of their bases differ in `dtype`|tensors of their bases"):
        load_adapters(["jo/y", "jo/full"])


def test_adapters_without_heads(hub: HubServer, tmp_path: Path) -> None:
    """The base has the head, and they leave it as it is."""
    seed_base(hub, tmp_path / "base", head=True)
    made = [publish_adapter(hub, tmp_path / n, f"jo/{n}", NEWS, seed=i, task_type=None) for i, n in enumerate("yz")]
    publish_adapter(hub, tmp_path / "head", "jo/head", NEWS, seed=3)
    adapters = load_adapters([one.repo_id for one in made])
    for policy in ("average", "union"):
        with pytest.raises(ValueError, match="needs a head in every adapter, but `y` brings none"):
            merge_adapters(adapters, head=policy)
    merge_adapters(adapters, [0, 1], head=None)
    torch.testing.assert_close(logits(adapters.model), made[1].logits, atol=1e-6, rtol=0)
    adapters.save_pretrained(tmp_path / "saved")
    assert "modules_to_save" in (tmp_path / "saved" / "adapter_config.json").read_text()
    both = load_adapters(["jo/y", "jo/head"])
    with pytest.raises(ValueError, match="head is None, for adapters without a head, but head bring"):
        merge_adapters(both, head=None)


def test_a_revision_can_be_named(hub: HubServer, tmp_path: Path) -> None:
    seed_base(hub, tmp_path / "base")
    old = publish_adapter(hub, tmp_path / "a", "jo/one", NEWS)
    new = publish_adapter(hub, tmp_path / "b", "jo/one", NEWS, seed=2)
    adapters = load_adapters({"old": f"jo/one@{old.sha}", "new": "jo/one"})
    assert torch.equal(logits(adapters.model), old.logits)
    adapters.use("new")
    assert torch.equal(logits(adapters.model), new.logits)
    assert adapters.members["old"].source == f"jo/one@{old.sha}"
    with pytest.raises(
        ValueError, match="no adapter can be called `score`, because the model has modules of that name"
    ):
        load_adapters({"old": "jo/one", "score": "jo/one"})
    with pytest.raises(ValueError, match="has no revision `v9`"):
        load_adapters(["jo/one@v9"])


# -- merging -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["news", "mail"])
def test_a_weight_of_one_is_the_adapter_itself(two: AdapterSet, which: str) -> None:
    two.use(which)
    alone = logits(two.model)
    other = "mail" if which == "news" else "news"
    merged = merge_adapters(two, {"news": float(which == "news"), "mail": float(which == "mail")}, head=which)
    assert merged is two
    assert (two.active, two.names) == ("merged", ("news", "mail", "merged"))
    torch.testing.assert_close(logits(two.model), alone, atol=1e-6, rtol=0)
    assert two.labels == {"news": NEWS, "mail": MAIL}[which]
    merge_adapters(two, {which: 0.5, other: 0.5}, head=which, name="both")
    assert (logits(two.model) - alone).abs().max() > 1e-3, "the control"
    two.use(which)
    assert torch.equal(logits(two.model), alone), "the adapters are as they were"


@pytest.mark.parametrize("weights", [[0.3, 0.7], [1.0, 1.0], [1.0, -0.5], None])
def test_the_weighted_sum_is_exact(two: AdapterSet, weights: list[float] | None) -> None:
    parts = [deltas(two.model, name) for name in ("news", "mail")]
    merge_adapters(two, weights, head="news")
    first, second = weights or (0.5, 0.5)
    found = deltas(two.model, "merged")
    assert found.keys() == parts[0].keys() | parts[1].keys()
    assert parts[0].keys() - parts[1].keys(), "the control: layers that only one of them has"
    assert parts[1].keys() - parts[0].keys()
    for key, delta in found.items():
        expected = sum(w * part[key] for w, part in ((first, parts[0]), (second, parts[1])) if key in part)
        torch.testing.assert_close(delta, expected, atol=1e-6, rtol=0)
    assert configs(two.model)["merged"].r == 5


def test_the_logits_are_those_of_the_summed_weights(two_on_hub: AdapterSet) -> None:
    parts = {name: deltas(two_on_hub.model, name) for name in ("news", "mail")}
    merge_adapters(two_on_hub, [0.4, 0.6], head="news")
    plain = pull("acme/news").model.unload()  # type: ignore[operator]
    plain.classifier = pull("acme/news").model.get_base_model().classifier.modules_to_save["default"]  # type: ignore[operator]
    with torch.no_grad():
        for weight, name in ((0.4, "news"), (0.6, "mail")):
            for key, delta in parts[name].items():
                plain.get_submodule(key.removeprefix("base_model.model.")).weight += weight * delta.float()
    torch.testing.assert_close(logits(two_on_hub.model), logits(plain), atol=1e-5, rtol=0)


def test_average_matches_the_outputs_by_name(hub: HubServer, tmp_path: Path) -> None:
    seed_base(hub, tmp_path / "base")
    publish_adapter(hub, tmp_path / "a", "jo/one", NEWS)
    publish_adapter(hub, tmp_path / "b", "jo/two", ("good", "bad", "fair"), seed=2)
    adapters = merge_adapters(["jo/one", "jo/two"], [1, 3], head="average")
    one, two, merged = (
        adapters.model.get_base_model().classifier.modules_to_save[name]
        for name in ("one", "two", "merged")  # type: ignore[operator]
    )
    for ours, a, b in zip(merged.parameters(), one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(ours, 0.25 * a + 0.75 * b[[1, 2, 0]], atol=1e-7, rtol=0)
    assert adapters.labels == NEWS
    with pytest.raises(ValueError, match=r"the weights .* give no mean of heads; expected none below 0"):
        merge_adapters(adapters, {"one": 1, "two": -1}, head="average", name="less")


def test_union_has_the_outputs_of_all(two: AdapterSet, tmp_path: Path) -> None:
    merge_adapters(two, [1, 3], head="union")
    assert two.labels == ("bad", "fair", "good")
    news, mail, merged = (
        two.model.get_base_model().classifier.modules_to_save[name].weight
        for name in ("news", "mail", "merged")  # type: ignore[operator]
    )
    torch.testing.assert_close(merged[0], 0.25 * news[0] + 0.75 * mail[1], atol=1e-7, rtol=0)
    torch.testing.assert_close(merged[2], 0.25 * news[2] + 0.75 * mail[0], atol=1e-7, rtol=0)
    assert torch.equal(merged[1], news[1])
    assert two.model.get_base_model().config.label2id == {"bad": 0, "fair": 1, "good": 2}  # type: ignore[operator]
    two.use("mail")
    assert two.model.get_base_model().config.num_labels == 2  # type: ignore[operator]


def test_union_of_other_labels_is_wider(hub: HubServer, tmp_path: Path) -> None:
    seed_base(hub, tmp_path / "base")
    publish_adapter(hub, tmp_path / "a", "jo/one", NEWS)
    publish_adapter(hub, tmp_path / "b", "jo/two", ("ham", "bad", "spam"), seed=2)
    adapters = merge_adapters(["jo/one", "jo/two"], head="union")
    assert adapters.labels == ("bad", "fair", "good", "ham", "spam")
    assert logits(adapters.model).shape == (8, 5)
    loss = adapters.model(**INPUTS, labels=torch.full((8,), 4)).loss
    assert torch.isfinite(loss)
    adapters.save_pretrained(tmp_path / "saved")
    found = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert found["auto_mapping"]["id2label"]["4"] == "spam"


def test_the_merge_is_saved_and_loaded_by_peft(two_on_hub: AdapterSet, tmp_path: Path) -> None:
    merge_adapters(two_on_hub, head="news")
    two_on_hub.save_pretrained(tmp_path / "saved")
    two_on_hub.save_pretrained(tmp_path / "mail", "mail")
    for folder, name in (("saved", "merged"), ("mail", "mail")):
        config = json.loads((tmp_path / folder / "adapter_config.json").read_text())
        head = config["auto_mapping"]
        cls = getattr(transformers, head["base_model_class"])
        base = cls.from_pretrained(
            config["base_model_name_or_path"], id2label=head["id2label"], label2id=head["label2id"]
        )
        loaded = peft.PeftModel.from_pretrained(base, str(tmp_path / folder))
        two_on_hub.use(name)
        assert torch.equal(logits(loaded), logits(two_on_hub.model))
    assert (tmp_path / "saved" / "adapter_model.safetensors").stat().st_size < 30_000, "one adapter only"


WAYS: list[tuple[str, dict[str, Any]]] = [
    ("svd", {}),
    ("svd", {"svd_rank": 5}),
    ("ties_svd", {"density": 0.5}),
    ("linear", {}),
    ("ties", {"density": 0.5}),
    ("dare_linear", {"density": 0.9}),
    ("magnitude_prune", {"density": 0.5}),
]


def test_other_ways_of_combining(hub: HubServer, tmp_path: Path) -> None:
    seed_base(hub, tmp_path / "base")
    publish_adapter(hub, tmp_path / "a", "jo/one", NEWS)
    publish_adapter(hub, tmp_path / "b", "jo/two", NEWS, seed=2)
    adapters = merge_adapters(["jo/one", "jo/two"], head="one", name="exact")
    exact = logits(adapters.model)
    base = transformers.BertForSequenceClassification.from_pretrained("acme/base", num_labels=3)
    for number, (kind, options) in enumerate(WAYS):
        shares, name = {"one": 0.5, "two": 0.5}, f"way{number}"
        merge_adapters(adapters, shares, head="one", name=name, combination_type=kind, **options)
        distance = (logits(adapters.model) - exact).abs().max()
        # A rank of five is no less than the sum of the two, four: nothing is cut off.
        assert distance < 1e-5 if options == {"svd_rank": 5} else distance > 1e-4, (kind, options, distance)
        adapters.save_pretrained(tmp_path / name)
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / name))
        torch.testing.assert_close(logits(loaded), logits(adapters.model), atol=1e-6, rtol=0)


def test_embeddings_and_more_layers_than_peft_lists_by_name(hub: HubServer, tmp_path: Path) -> None:
    """From 20 names on PEFT looks for endings that stand for all of them."""
    seed_base(hub, tmp_path / "base")
    targets = ["query", "key", "value", "dense", "word_embeddings", "position_embeddings"]
    publish_adapter(hub, tmp_path / "a", "jo/one", NEWS, target_modules=targets, rank_pattern={"key": 4})
    publish_adapter(hub, tmp_path / "b", "jo/two", NEWS, seed=2, target_modules=targets, layers_to_transform=[0])
    adapters = merge_adapters(["jo/one", "jo/two"], [0.3, 0.7], head="average")
    found = logits(adapters.model)
    adapters.save_pretrained(tmp_path / "saved")
    base = transformers.BertForSequenceClassification.from_pretrained("acme/base", num_labels=3)
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path / "saved"))
    assert torch.equal(logits(loaded), found)
    assert len(configs(loaded)["default"].target_modules) < 20, "the control"
    plain, head = pull("jo/one").model.unload(), adapters.model.get_base_model().classifier  # type: ignore[operator]
    plain.classifier = head.modules_to_save["merged"]
    parts = [
        {path: layer.get_delta_weight(name) for path, layer in adapters.model.get_base_model().named_modules()  # type: ignore[operator]
         if hasattr(layer, "get_delta_weight") and (name in layer.lora_A or name in layer.lora_embedding_A)}
        for name in ("one", "two")
    ]  # fmt: skip
    assert parts[0].keys() > parts[1].keys()
    with torch.no_grad():
        for weight, part in zip((0.3, 0.7), parts, strict=True):
            for path, delta in part.items():
                plain.get_submodule(path).weight += weight * delta
    torch.testing.assert_close(found, logits(plain), atol=1e-5, rtol=0)


def test_what_peft_itself_does(two_on_hub: AdapterSet) -> None:
    """When one of these no longer fails, PEFT has mended it, and there is less to do here."""
    with pytest.raises(ValueError, match="modules_to_save"):
        two_on_hub.model.base_model.add_weighted_adapter(["news", "mail"], [1.0, 1.0], "merged", combination_type="cat")
    alone = peft.PeftModel.from_pretrained(
        transformers.BertForSequenceClassification.from_pretrained("acme/base", num_labels=3), "acme/news"
    )
    with pytest.raises(RuntimeError, match=r"size mismatch for base_model\.model\.classifier"):
        alone.load_adapter("jo/mail", "mail")


def test_the_rslora_scale_of_the_first_is_not_applied_again(two: AdapterSet) -> None:
    two.use("mail")
    alone = logits(two.model)
    merge_adapters(two, {"mail": 1.0, "news": 0.0}, head="mail")
    torch.testing.assert_close(logits(two.model), alone, atol=1e-6, rtol=0)


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_another_base_is_refused_and_the_difference_is_named(hub: HubServer, tmp_path: Path) -> None:
    seed_base(hub, tmp_path / "base")
    seed_base(hub, tmp_path / "other", repo_id="acme/other", seed=1)
    publish_adapter(hub, tmp_path / "a", "jo/one", NEWS)
    publish_adapter(hub, tmp_path / "b", "jo/two", NEWS, base="acme/other")
    with pytest.raises(ValueError, match=r"`one` and `two` .* tensors of their bases .*acme/base at .*acme/other"):
        load_adapters(["jo/one", "jo/two"])
    hub.seed("acme/copy", {path.name: path for path in (tmp_path / "base").iterdir()}, user="alice")
    publish_adapter(hub, tmp_path / "c", "jo/three", NEWS, base="acme/copy")
    assert load_adapters(["jo/one", "jo/three"]).names == ("one", "three"), "the control: the same under another name"
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    files = {path.name: path for path in (tmp_path / "base").iterdir()}
    hub.seed("acme/relu", {**files, "config.json": json.dumps({**config, "hidden_act": "relu"})}, user="alice")
    publish_adapter(hub, tmp_path / "d", "jo/four", NEWS, base="acme/relu")
    with pytest.raises(ValueError, match="the configurations of their bases differ in `hidden_act`"):
        load_adapters(["jo/one", "jo/four"])


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (["jo/parts", "jo/whole"], r"does not fit beside the others: of `bert\.pooler` one brings the whole"),
        (["jo/whole", "jo/parts"], r"PEFT cannot have the adapter `parts` beside others: .*pooler\.dense"),
    ],
)
def test_a_module_that_one_brings_and_another_changes(
    hub: HubServer, tmp_path: Path, order: list[str], message: str
) -> None:
    seed_base(hub, tmp_path / "base")
    publish_adapter(hub, tmp_path / "a", "jo/whole", NEWS, modules_to_save=["pooler", "classifier"])
    publish_adapter(hub, tmp_path / "b", "jo/parts", NEWS, target_modules=["query", "pooler.dense"])
    with pytest.raises(ValueError, match=message):
        load_adapters(order)


def test_adapters_that_cannot_share_are_refused(hub: HubServer, tmp_path: Path) -> None:
    seed_base(hub, tmp_path / "base")
    publish_adapter(hub, tmp_path / "a", "jo/one", NEWS)
    ia3 = peft.IA3Config(task_type="SEQ_CLS", target_modules=["key"], feedforward_modules=[])
    publish_adapter(hub, tmp_path / "b", "jo/ia3", NEWS, adapter=ia3)
    publish_adapter(
        hub, tmp_path / "c", "jo/tags", NEWS, cls=transformers.BertForTokenClassification, task_type="TOKEN_CLS"
    )
    publish_adapter(hub, tmp_path / "d", "jo/biases", NEWS, bias="all")
    prompts = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)
    publish_adapter(hub, tmp_path / "e", "jo/prompts", NEWS, adapter=prompts)
    for repo, message in [
        ("jo/ia3", r"`other` is of the kind IA3, the other of LORA"),
        ("jo/tags", "`other` adapts a BertForTokenClassification, the other a BertForSequenceClassification"),
        ("jo/biases", "`other` has bias='all', which changes weights of the base itself"),
        ("jo/prompts", "`other` is of the kind PROMPT_TUNING, which adds inputs or layers"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_adapters({"one": "jo/one", "other": repo})


@pytest.mark.parametrize(
    ("repos", "message"),
    [
        ([], "expected a list of repositories"),
        ("jo/one", "expected a list of repositories"),
        (["jo/one", "acme/one"], "two adapters are called `one`; give each a name"),
        ({"a.b": "jo/one"}, "no adapter can be called `a.b`, because it has a dot"),
        (["jo/lora"], "no adapter can be called `lora`, because torch or PEFT has"),
        ({"keys": "jo/one"}, "no adapter can be called `keys`, because torch or PEFT has"),
    ],
)
def test_names_that_cannot_be(repos: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_adapters(repos)


REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (None, {"head": "best"}, 'head is `best`; expected "average", "union", None, or .*: news, mail'),
    ({"news": 1}, {"head": "mail"}, "head is `mail`; expected .* the name of an adapter: news"),
    (None, {"head": None}, "head is None, for adapters without a head, but news, mail bring one"),
    (None, {"head": "average"}, 'the same label names, but only `news` has `fair`; use head="union"'),
    ([1], {"head": "news"}, "there are 1 weights for the adapters news, mail; give each one"),
    ({"spam": 1}, {"head": "news"}, "weights names `spam`; expected some of the adapters: news, mail"),
    ([1, float("nan")], {"head": "news"}, "are not all finite"),
    (None, {"head": "news", "name": "mail"}, "there is an adapter `mail` already"),
    (None, {"head": "news", "name": "score"}, "called `score`, because the model has modules of that name"),
    (None, {"head": "news", "name": "union"}, "called `union`, because that is a policy for heads"),
    (None, {"head": "news", "name": "half"}, "called `half`, because torch or PEFT has something"),
    (None, {"head": "news", "combination_type": "ties"}, "density is None for combination_type `ties`"),
    (None, {"head": "news", "density": 0.5}, "density is 0.5 for combination_type `cat`"),
    (None, {"head": "news", "combination_type": "linear"}, "must have the same r value"),
    (None, {"head": "news", "combination_type": "sum"}, "Invalid combination_type: sum"),
    (None, {"head": "news", "combination_type": "svd", "svd_rank": 40}, "made layers of the ranks .*, not 40"),
]


def test_merges_that_are_refused_leave_the_adapters_as_they_were(two: AdapterSet) -> None:
    before, names = logits(two.model), {name for name, _ in two.model.named_modules()}
    for weights, options, message in REFUSED:
        with pytest.raises(ValueError, match=message):
            merge_adapters(two, weights, **options)
        assert two.names == ("news", "mail")
        assert set(configs(two.model)) == {"news", "mail"}
        assert {name for name, _ in two.model.named_modules()} == names
        assert torch.equal(logits(two.model), before)
    two.use("mail")
    assert not torch.equal(logits(two.model)[:, :2], before[:, :2]), "the control"


def test_the_policy_has_no_default(two: AdapterSet) -> None:
    with pytest.raises(TypeError, match="head"):
        merge_adapters(two)  # type: ignore[call-arg]


def test_dora_is_not_merged(hub: HubServer, tmp_path: Path) -> None:
    seed_base(hub, tmp_path / "base")
    publish_adapter(hub, tmp_path / "a", "jo/one", NEWS)
    publish_adapter(hub, tmp_path / "b", "jo/two", NEWS, use_dora=True, init_lora_weights=True)
    with pytest.raises(ValueError, match=r"`two` is of the kind LORA with use_dora, .* expected plain LORA"):
        merge_adapters(["jo/one", "jo/two"], head="one")


# -- the rules for heads, without adapters -----------------------------------------------------------------------------


def head(name: str, labels: tuple[str, ...], module: nn.Module | None = None, weight: float = 1, **kind: Any) -> Head:
    modules = {"classifier": module or nn.Linear(4, len(labels))}
    return Head(name, modules, labels, kind.get("problem_type"), weight)


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ([Head("a", {}, NEWS, None, 1), head("b", NEWS)], "needs a head in every adapter, but `a` brings none"),
        ([head("a", ("LABEL_0", "LABEL_1")), head("b", MAIL)], r"those of `a` were never given \(`LABEL_0`, ...\)"),
        ([head("a", ("x", "x")), head("b", ("x", "x"))], "but `a` has `x` more than once"),
        ([head("a", MAIL, problem_type="regression"), head("b", MAIL, problem_type="single_label_classification")],
         "one kind of problem, but `a` is for regression, `b` is for single_label_classification"),
        ([head("a", MAIL, nn.Conv1d(4, 2, 1)), head("b", MAIL, nn.Conv1d(4, 2, 1))], "no linear layer with 2 outputs"),
        ([head("a", MAIL, weight=0), head("b", MAIL, weight=0)], "give no mean of heads"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("policy", [averaged, united])
def test_heads_that_nothing_can_be_made_of(policy: Any, heads: list[Head], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        policy(heads)


def test_forms_that_differ() -> None:
    with pytest.raises(ValueError, match="needs heads of one form; those of `a`, `b` differ"):
        averaged([head("a", MAIL), head("b", MAIL, nn.Linear(4, 2, bias=False))])
    with pytest.raises(ValueError, match="needs last layers of one form, but those of `a` and `b` are Linear"):
        united([head("a", MAIL), head("b", MAIL, nn.Linear(4, 2, bias=False))])


def test_a_union_over_equal_layers_below() -> None:
    one, other = (nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, n)) for n in (3, 2))
    other[0].load_state_dict(one[0].state_dict())
    modules, labels = united([head("a", NEWS, one), head("b", ("x", "y"), other)])
    features = torch.randn(5, 4)
    torch.testing.assert_close(modules["classifier"](features), torch.cat([one(features), other(features)], dim=1))
    assert labels == (*NEWS, "x", "y")
    assert one(features).shape == (5, 3), "the first head is as it was"


def test_one_number_needs_no_name() -> None:
    merged = averaged([head("a", ("LABEL_0",)), head("b", ("LABEL_0",))])
    assert merged["classifier"].weight.shape == (1, 4)
