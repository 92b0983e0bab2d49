"""Cards: what they state, whose text stays, and that hostile values stay data."""

import copy
import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData
from markdown_it import MarkdownIt

from hub_cards import Card, RunFacts, read_facts, render, write_card
from hub_cards.licences import Licence
from hub_cards.metadata import eval_results
from tests.hub_cards import runs

HOSTILE = [
    "<script>alert(1)</script>",
    "a\n\n## Results\n\nfine",
    "</td></tr>|x|y|",
    "```\n# out\n```",
    "`` ` ``` `",
    "{{ facts.versions }}{% raw %}",
    "${HOME} $(id) `id`",
    "![x](https://example.com/x.png) [y](javascript:alert(1))",
    "---\nlicense: mit\n---",
    '": {a: [b', "!!python/object/apply:os.system ['id']", "&anchor *alias", "null", "~", "1. one", "- dash", "# hash",
    "<!-- tl:begin Limits (owned) --> x <!-- tl:end Limits (owned) -->", "<!-- tl:end Uses (000000000000) -->",
    "\u202egnp.exe", "a\x00b\x1b[31m", "\\", "\\|", "*bold* _it_ ~s~", "&lt;b&gt;", "<https://example.com>", "$x^2$",
]  # fmt: skip


def facts_of(tmp_path: Path, **changes: Any) -> RunFacts:
    return read_facts(runs.write(tmp_path, runs.recipe(**changes)))


@pytest.fixture
def facts(tmp_path: Path) -> RunFacts:
    return facts_of(tmp_path / "run", comparison=runs.COMPARISON)


def body(card: str) -> str:
    return card.split("---\n", 2)[2]


def headings(card: str) -> list[str]:
    tokens = MarkdownIt("commonmark").enable("table").parse(body(card))
    return [tokens[at + 1].content for at, token in enumerate(tokens) if token.type == "heading_open"]


def test_the_card_states_what_happened(facts: RunFacts) -> None:
    card = render(facts)
    for text in (
        "`jo/small-bert`", "a" * 40, "b" * 64, "`jo/mails`", "e" * 40, "64", "`ham`, `spam`", "1–4", "5–10", "step 4",
        "never", "0.008", "decoupled, strength 0.01", "halves in 69 steps", "seed 3", "0.75", "50.00 [40.00, 60.00]",
        "+25.00 [+20.00, +30.00]", "(did not converge)", "**gradual unfreezing**", "Transfer: positive at n = 50",
        "12.5", "400.0 MB", "40 %", "python train.py --train_file train.csv", "d" * 40, "torch 2.13.0",
        "figures/curve.png",
    ):  # fmt: skip
        assert text in card, text


def test_what_was_not_measured_is_said_to_be_so(tmp_path: Path) -> None:
    found = runs.recipe()
    for key in ("data", "results", "command", "commit", "task", "preprocessing"):
        del found[key]
    del found["training"]["cost"]
    found["model"] |= {"fingerprint": None, "revision": None}
    card = render(read_facts(runs.write(tmp_path, found, runs.state(log_history=[]))))
    assert card.count("not measured") + card.count("not recorded") > 8
    for text in (
        "results were not measured",
        "whether transfer helped is not known",
        "data were not recorded",
        "Not logged",
    ):
        assert text in card
    assert "None" not in card


def test_what_was_kept_of_the_base_is_a_table(tmp_path: Path) -> None:
    recipe = {**runs.RECIPE, "methods": {**runs.RECIPE["methods"], "ForgettingMonitor": runs.RETENTION}}
    card = render(read_facts(runs.write(tmp_path, recipe)))
    assert "| `retrieval` | `recall@1; now / before` | 0.5 | 0.48 | 0.96 |" in card
    assert "| `probe` | `accuracy; now / before` | – | – | – |" in card
    assert "At least 0.95 was asked for, which the run kept." in card
    assert "Not measured or not recorded: retention" not in card
    lost = {**runs.RETENTION, "retention": 0.9}
    recipe["methods"] = {**recipe["methods"], "ForgettingMonitor": lost}
    assert "which the run did not keep." in render(read_facts(runs.write(tmp_path, recipe)))
    broken = {**lost["measures"]["text"], "after": None, "retention": None}
    measures = {**lost["measures"], "text": broken}
    recipe["methods"]["ForgettingMonitor"] = {**lost, "retention": None, "weights_of_step": 6, "measures": measures}
    card = render(read_facts(runs.write(tmp_path, recipe)))
    assert "\n`text` was measured and is no number: a weight of this model is NaN or infinite. At least 0.95" in card
    assert "which the run did not keep." in card


def test_a_comparison_needs_no_more_than_the_schema_asks_for(tmp_path: Path) -> None:
    least = {key: runs.COMPARISON[key] for key in ("row", "n", "seeds", "metric", "split", "level")}
    rows = [{key: row[key] for key in ("row", "label", "value")} for row in runs.COMPARISON["rows"]]
    card = render(facts_of(tmp_path, comparison={**least, "rows": rows}))
    assert "**gradual unfreezing**" in card
    assert "None" not in card


def test_a_comparison_shows_retention_where_it_was_measured(facts: RunFacts, tmp_path: Path) -> None:
    comparison = copy.deepcopy(runs.COMPARISON)
    comparison["rows"][0]["retention"] = None
    comparison["rows"][1]["retention"] = {"mean": 0.96, "low": 0.9, "high": 1.0}
    comparison["front"] = {"rows": ["gradual"], "sentence": "Front of accuracy and retention: gradual."}
    card = render(facts_of(tmp_path / "retained", comparison=comparison))
    lines = [line for line in card.splitlines() if line.startswith("| way of adapting")]
    assert [line.count("|") for line in lines] == [8]
    assert "| gain over training from scratch | retention, % | each seed |" in lines[0]
    assert "| +25.00 [+20.00, +30.00] | 96.00 [90.00, 100.00] | 70.0, 80.0 |" in card
    assert "| – | – | 40.0, 60.0 |" in card
    assert "\n\nFront of accuracy and retention: gradual.\n" in card
    assert "\n\n\n\n" not in card
    tokens = MarkdownIt("commonmark").enable("table").parse(body(card))
    starts = [at for at, token in enumerate(tokens) if token.type == "tr_open"]
    assert 7 in {len([t for t in _row(tokens, at) if t.type == "td_open"]) for at in starts}
    plain = render(facts)  # control
    assert "Front of" not in plain
    assert "retention, %" not in plain


def test_equal_facts_give_equal_cards_and_nothing_is_written(facts: RunFacts, tmp_path: Path) -> None:
    assert render(facts) == render(copy.deepcopy(facts))
    assert not (tmp_path / "run" / "README.md").exists()


def test_the_metadata_are_the_hubs(facts: RunFacts) -> None:
    licensed = dataclasses.replace(
        facts, licence=Licence("other", "mine", "https://example.com/x"), repo_id="jo/mails-bert"
    )
    card = ModelCard(render(licensed))
    assert isinstance(card.data, ModelCardData)
    data = card.data.to_dict()
    assert data["base_model"] == "jo/small-bert"
    assert data["language"] == ["en"]
    assert data["base_model_relation"] == "finetune"
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "text-classification")
    assert (data["datasets"], data["metrics"]) == (["jo/mails"], ["accuracy"])
    assert (data["license"], data["license_name"], data["license_link"]) == ("other", "mine", "https://example.com/x")
    assert data["tags"] == ["tl-callbacks", "transfer-learning"]
    assert {result.metric_type: result.metric_value for result in card.data.eval_results} == {
        "accuracy": 0.75,
        "loss": 0.5,
    }
    assert card.data.eval_results[0].dataset_revision == "e" * 40
    (file,) = eval_results(licensed).items()
    assert file[0] == ".eval_results/jo--mails.yaml"
    assert yaml.safe_load(file[1])[0]["dataset"] == {
        "id": "jo/mails", "task_id": "text-classification", "revision": "e" * 40
    }  # fmt: skip


@pytest.mark.parametrize(
    ("merged", "relation", "library"), [(False, "adapter", "peft"), (True, "merge", "transformers")]
)
def test_adapters_and_merged_models(tmp_path: Path, merged: bool, relation: str, library: str) -> None:
    facts = dataclasses.replace(facts_of(tmp_path, model__adapters=runs.ADAPTERS), merged=merged)
    data = yaml.safe_load(render(facts).split("---\n")[1])
    assert (data["base_model_relation"], data["library_name"]) == (relation, library)
    assert "lora" in data["tags"]
    assert ("PeftModel.from_pretrained" in render(facts)) is not merged


def test_a_local_base_is_its_fingerprint_and_never_base_model(tmp_path: Path) -> None:
    local = {"model__name_or_path": "/scratch/jo/models/bert", "model__local": True}
    for adapters in (None, runs.ADAPTERS):
        card = render(facts_of(tmp_path, **local, model__adapters=adapters))
        assert "base_model" not in card.split("---\n")[1]
        assert "/scratch" not in card
        assert "b" * 64 in card


def test_only_finite_numbers_reach_the_metadata(tmp_path: Path) -> None:
    facts = facts_of(tmp_path, results={"test": {"accuracy": float("nan"), "f1": 0.5, "loss": float("inf")}})
    card = render(facts)
    assert "not finite (nan)" in card
    results = yaml.safe_load(card.split("---\n")[1])["model-index"][0]["results"]
    assert [metric["type"] for result in results for metric in result["metrics"]] == ["f1"]
    assert "nan" not in eval_results(facts)[".eval_results/jo--mails.yaml"]


@pytest.mark.parametrize("value", HOSTILE)
def test_hostile_values_stay_data(tmp_path: Path, value: str) -> None:
    comparison = {**copy.deepcopy(runs.COMPARISON), "note": value, "metric": value}
    comparison["rows"][0]["label"] = value
    changes = {
        "model__id2label": {"0": value, "1": "spam"},
        "model__name_or_path": value, "model__local": True,
        "data__name": value, "data__local": True, "data__config": value,
        "data__splits": {value: {"rows": 1, "fingerprint": None}},
        "preprocessing": {value: value},
        "methods__Strategy": {"name": value, "options": {value: value}},
        "command": ["python", value],
        "language": value,
        "versions": {value: value},
        "results": {value: {value: 0.5}},
        "commit": {"sha": value, "dirty": False},
        "comparison": comparison,
    }  # fmt: skip
    plain = render(
        dataclasses.replace(facts_of(tmp_path, comparison=runs.COMPARISON, data__local=True, model__local=True))
    )
    log = [
        *runs.STATE["log_history"],
        {f"tl/rate/{value}": 0.5, "step": 1},
        {"loss": 1.0, "eval_" + value: 0.5, "step": 2},
    ]
    hostile = read_facts(runs.write(tmp_path, runs.recipe(**changes), runs.state(log_history=log)))
    card = render(dataclasses.replace(hostile, licence=Licence("other", value, value, (value,))))
    assert headings(card)[1:] == headings(plain)[1:]
    tokens = MarkdownIt("commonmark").enable("table").parse(body(card))
    assert [token.content for token in tokens if token.type == "html_block" and "<!-- tl:" not in token.content] == []
    inline = [child for token in tokens for child in token.children or []]
    assert [child.content for child in inline if child.type == "html_inline" and "<!-- tl:" not in child.content] == []
    assert all(child.attrs["src"].startswith("figures/") for child in inline if child.type == "image")
    assert not [child for child in inline if child.type == "link_open"]
    widths = [
        len([t for t in _row(tokens, at) if t.type == "td_open"]) for at, t in enumerate(tokens) if t.type == "tr_open"
    ]
    assert set(widths) <= {0, 2, 3, 4, 5, 6}
    data = yaml.safe_load(card.split("\n---\n", 1)[0].removeprefix("---\n"))
    assert set(data) <= {
        "language",
        "library_name",
        "license",
        "license_name",
        "license_link",
        "metrics",
        "pipeline_tag",
        "tags",
        "model-index",
    }
    assert Card(hostile).keep(card).paths[0] == "Title"
    assert [section.name for section in Card(hostile).keep(card)._sections] == [s.name for s in Card(hostile)._sections]


def _row(tokens: list[Any], at: int) -> list[Any]:
    end = next(place for place in range(at, len(tokens)) if tokens[place].type == "tr_close")
    return tokens[at:end]


def test_sections_are_added_replaced_and_dropped_by_path(facts: RunFacts) -> None:
    card = Card(facts).add("Ethics", "Public texts.").add("Uses/Foreseeable misuse", "Spying.")
    card.replace("Uses/Out of scope", "Poems.").replace("Citation", "Cite me.").drop("Cost").drop(
        "Results/Beside other ways"
    )
    assert card.select("Uses/Out of scope") == "Poems."
    assert card.select("Ethics") == "Public texts."
    assert "Cost" not in card.paths
    assert "Results/Beside other ways" not in card.paths
    text = str(card)
    assert headings(text).index("Foreseeable misuse") == headings(text).index("Out of scope") + 1
    assert "Howard" not in text
    assert headings(text)[-1] == "Ethics"
    again = str(Card(facts).keep(text))
    assert again == text  # what is one's own stays when the card is made again


def test_unknown_and_taken_paths_are_refused(facts: RunFacts) -> None:
    card = Card(facts)
    for act in (card.select, card.drop, lambda path: card.replace(path, "x")):
        with pytest.raises(KeyError, match="no section `Use`; its sections are Title, Uses, Uses/Intended use"):
            act("Use")
    with pytest.raises(ValueError, match="has a section `Uses` already; expected a new one"):
        card.add("Uses", "x")


def changed(facts: RunFacts) -> RunFacts:
    return dataclasses.replace(
        facts, results=(dataclasses.replace(facts.results[0], value=0.5),), versions={"torch": "9"}
    )


def test_text_between_sections_stays_in_its_place(facts: RunFacts) -> None:
    card = render(facts)
    mine = (
        card.replace("<!-- tl:begin Uses", "My introduction.\n\n<!-- tl:begin Uses").rstrip()
        + "\n\n## Thanks\n\nTo all.\n"
    )
    again = str(Card(changed(facts)).keep(mine))
    assert again.index("# small-bert") < again.index("My introduction.") < again.index("## Uses")
    assert again.rstrip().endswith("To all.")
    assert "0.5" in again
    assert "torch 9" in again
    assert str(Card(changed(facts)).keep(again)) == again


def test_an_edit_stays_and_facts_that_changed_since_stand_above_it(facts: RunFacts) -> None:
    card = render(facts)
    edited = card.replace("One run, seed 3.", "One run, which I liked.").replace(
        "Decisions on people", "Decisions on cats"
    )
    edited = edited.replace("\n", "\r\n")  # as a browser sends it
    same = str(Card(facts).keep(edited))
    assert "One run, seed 3." not in same
    assert "which I liked." in same
    assert same.count("## Results") == 1
    after = str(Card(changed(facts)).keep(edited))
    assert after.index("One run, seed 3.") < after.index("which I liked.")
    assert "Decisions on cats" in after
    assert "Decisions on people" not in after
    assert str(Card(changed(facts)).keep(after)) == after


def test_a_section_that_was_emptied_stays_empty_while_the_facts_stay(facts: RunFacts) -> None:
    card = re.sub(r"(<!-- tl:begin Citation \(.*?\) -->\n).*?\n(<!-- tl:end)", r"\1\2", render(facts), flags=re.DOTALL)
    assert "Howard" not in str(Card(facts).keep(card))


def test_somebody_elses_card_is_kept_whole_and_a_librarys_own_is_not(facts: RunFacts) -> None:
    facts = dataclasses.replace(facts, language=())
    theirs = "---\nlanguage: de\ntags: [mails]\nwidget:\n- text: hallo\n---\n\n# My model\n\nIt is good.\n"
    card = str(Card(facts).keep(theirs))
    data = yaml.safe_load(card.split("---\n")[1])
    assert data["tags"] == ["tl-callbacks", "transfer-learning", "mails"]
    assert (data["language"], data["widget"]) == ("de", [{"text": "hallo"}])
    assert "It is good." in card
    stock = (
        "<!-- This model card has been generated automatically according to the information the Trainer had access to"
    )
    assert str(Card(facts).keep(f"---\nlanguage: de\n---\n{stock}\n# x\n")) == render(facts)
    template = "# Model Card for Model ID\n" + "[More Information Needed]\n" * 20
    assert str(Card(facts).keep(template)) == render(facts)


def test_two_versions_of_ones_own_text_stay_and_one_within_the_other_once(facts: RunFacts) -> None:
    local, remote = render(facts) + "\n## Thanks\n\nTo all.\n", render(facts) + "\n## Thanks\n\nTo all.\n\nAnd to Jo.\n"
    assert str(Card(facts).keep(local).keep(remote)).count("To all.") == 1
    assert "And to Jo." in str(Card(facts).keep(local).keep(remote))
    assert "And to Jo." in str(Card(facts).keep(remote).keep(local))
    other = render(facts) + "\n## Funding\n\nNone.\n"
    both = str(Card(facts).keep(local).keep(other))
    assert "To all." in both
    assert "None." in both


def test_metadata_that_are_none_are_refused(facts: RunFacts) -> None:
    with pytest.raises(ValueError, match="metadata of the earlier card are no YAML"):
        Card(facts).keep("---\na: [\n---\nx")
    with pytest.raises(ValueError, match="are a list, expected keys and values"):
        Card(facts).keep("---\n- a\n---\nx")


def test_writing_keeps_local_text_and_draws_the_pictures(facts: RunFacts, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    path = write_card(facts, folder)
    path.write_text(path.read_text() + "\nMine.\n")
    write_card(changed(facts), folder, existing=render(facts) + "\nFrom the Hub.\n")
    text = path.read_text()
    assert "Mine." in text
    assert "From the Hub." in text
    shown = set(re.findall(r"\]\((figures/[^)]+)\)", text))
    assert shown == {f"figures/{file.name}" for file in (folder / "figures").iterdir()}
    assert shown == {"figures/curve.png", "figures/rates.png", "figures/comparison.png"}


def test_a_card_that_cannot_be_made_leaves_the_old_one(facts: RunFacts, tmp_path: Path) -> None:
    path = tmp_path / "run" / "README.md"
    path.write_text("---\n- a\n---\nmine")
    with pytest.raises(ValueError, match="expected keys and values"):
        write_card(facts, tmp_path / "run")
    assert path.read_text() == "---\n- a\n---\nmine"
    assert not (tmp_path / "run" / "figures").exists()


@pytest.mark.parametrize(
    "task", ["text-classification", "token-classification", "image-classification", "text-generation"]
)
@pytest.mark.parametrize("num_labels", [1, 2])
def test_every_snippet_is_python(tmp_path: Path, task: str, num_labels: int) -> None:
    for adapters in (None, runs.ADAPTERS):
        card = render(facts_of(tmp_path, task=task, model__num_labels=num_labels, model__adapters=adapters))
        blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
        assert len(blocks) == (2 if adapters else 1)
        for block in blocks:
            compile(block, "card", "exec")
        assert "pulled.model" in blocks[0]
