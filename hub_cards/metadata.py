"""The card's metadata, made by huggingface_hub's own classes, and the files that carry single results."""

import math
from collections.abc import Mapping
from typing import Any, cast

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml

from hub_cards.facts import Result, RunFacts
from hub_cards.summary import title

TAGS = ("tl-callbacks", "transfer-learning")
# Of an earlier card, no longer true once a card does not state them itself.
_OURS = ("model-index", "metrics", "base_model", "base_model_relation", "library_name", "pipeline_tag", "datasets")


def metadata(facts: RunFacts) -> dict[str, Any]:
    """Return the card's metadata as plain values: finite numbers, and no name of a local file or folder as an id.

    Example:
        >>> from hub_cards.facts import Base
        >>> facts = RunFacts(10, 10, "BertForSequenceClassification", base=Base(folder="minilm", digest="0" * 64))
        >>> metadata(facts)
        {'library_name': 'transformers', 'tags': ['tl-callbacks', 'transfer-learning']}
    """
    data, licence = facts.data, facts.licence
    named = facts.base.name is not None
    evaluated = [_eval_result(facts, result) for result in _finite(facts)] if data and data.name and facts.task else []
    card_data = ModelCardData(
        base_model=facts.base.name,
        language=list(facts.language) or None,
        library_name="peft" if facts.is_adapter else "transformers",
        pipeline_tag=facts.task,
        datasets=[data.name] if data and data.name and not data.local else None,
        metrics=sorted({result.metric for result in _finite(facts)} - {"loss"}) or None,
        license=licence.identifier if licence else None,
        license_name=licence.name if licence else None,
        license_link=licence.link if licence else None,
        tags=[*TAGS, *_method_tags(facts)],
        eval_results=evaluated or None,
        model_name=title(facts) if evaluated else None,
        base_model_relation=relation(facts) if named else None,
        base_model_revision=facts.base.revision if named else None,
    )
    return {key: value for key, value in cast(Any, card_data).to_dict().items() if value is not None}


def relation(facts: RunFacts) -> str:
    """Return what the weights are to the base, in the Hub's words.

    Example:
        >>> relation(RunFacts(10, 10, "PeftModel", adapters={"default": {"peft_type": "LORA"}}))
        'adapter'
    """
    return "merge" if facts.merged else "adapter" if facts.is_adapter else "finetune"


def eval_results(facts: RunFacts) -> dict[str, str]:
    """Return the files of `.eval_results/`: a YAML text by file name; none where the data are not on the Hub."""
    data = facts.data
    if data is None or data.local or data.name is None or not facts.task:
        return {}
    entries = [
        EvalResultEntry(
            dataset_id=data.name,
            task_id=facts.task,
            value=result.value,
            dataset_revision=data.revision,
            notes=f"{result.metric} on {result.split}",
        )
        for result in _finite(facts)
    ]
    if not entries:
        return {}
    text = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True)
    return {f".eval_results/{data.name.replace('/', '--')}.yaml": text}


def merge_metadata(new: Mapping[str, Any], old: Mapping[str, Any]) -> dict[str, Any]:
    """Return the new metadata with the keys and tags that somebody else has added.

    Example:
        >>> merge_metadata({"tags": ["a"], "metrics": ["f1"]}, {"tags": ["b"], "language": "de", "metrics": ["x"]})
        {'tags': ['a', 'b'], 'metrics': ['f1'], 'language': 'de'}
    """
    own = {key: value for key, value in old.items() if key not in new and (key not in _OURS or key == "base_model")}
    if "base_model" in own:  # somebody's own statement on a base that was a local folder
        own |= {key: old[key] for key in ("base_model_relation",) if key in old}
    merged = {**new, **own}
    tags = old.get("tags")
    if isinstance(tags, list):
        merged["tags"] = [*new.get("tags", []), *(tag for tag in tags if tag not in new.get("tags", []))]
    return merged


def _finite(facts: RunFacts) -> list[Result]:
    return [result for result in facts.results if math.isfinite(result.value)]


def _method_tags(facts: RunFacts) -> list[str]:
    kinds = {str(config.get("peft_type", "")).lower() for config in facts.adapters.values()}
    return sorted(kinds - {""})


def _eval_result(facts: RunFacts, result: Result) -> EvalResult:
    assert facts.data is not None
    assert facts.data.name is not None
    assert facts.task is not None
    split = facts.data.splits.get(result.split)
    return EvalResult(
        task_type=facts.task,
        dataset_type="local" if facts.data.local else facts.data.name,
        dataset_name=facts.data.name,
        dataset_config=facts.data.config,
        dataset_split=split.source if split and split.source else result.split,
        dataset_revision=facts.data.revision,
        metric_type=result.metric,
        metric_value=result.value,
    )
