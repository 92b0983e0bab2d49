"""What `recipe.json` says of a split, so that an evaluation can be repeated on the same rows."""

from collections.abc import Mapping

from datasets import Dataset

from hub_cards import content_fingerprint


def split_facts(dataset: Dataset, columns: Mapping[str, str], split: str) -> dict[str, int | str]:
    """Return what `recipe.json` says of a split: its rows, their content, and its name in the data set.

    Example:
        >>> split_facts(Dataset.from_dict({"text": ["a", "b"]}), {"text": "text"}, "train")["rows"]
        2
    """
    return {"rows": dataset.num_rows, "fingerprint": content_fingerprint(dataset, columns), "split": split}
