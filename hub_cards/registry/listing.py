"""The adapters of one base on the Hub, listed and compared. No torch, and nothing of a repository is run."""

import argparse
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelInfo
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.repocard_data import model_index_to_eval_results
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

from hub_cards.markdown import Markdown, cell, escape, number, size
from hub_cards.paths import is_repo_id
from hub_cards.pulling.snapshots import fetch
from hub_cards.tokens import check_token

NOT_STATED = "not stated"
CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_LARGEST_CONFIG = 1 << 20  # bytes; PEFT's own have a few thousand
_LOWER_IS_BETTER = ("loss", "error", "perplexity", "mse", "rmse", "mae", "wer", "cer", "ece", "brier")


@dataclass(frozen=True)
class AdapterInfo:
    """What the Hub says of an adapter. None and empty mean "not stated", or that the token may not read it.

    Attributes:
        repo_id: where it lies.
        revision: its commit when the list was made.
        base_revision: the base's commit that `adapter_config.json` names.
        kind: PEFT's name of the method, such as LORA.
        rank: `r` of `adapter_config.json`.
        size_bytes: of the file with its weights.
        metrics: "split/metric" to the value that the card states; where a card states results on several data sets,
            "data set/split/metric".
        data: names of the data sets that the results are on, or, without results, those that it was trained on.
        license: the Hub's identifier.
        last_modified: when the repository was changed last.
        private: whether only its owners see it.
        gated: False, or how access is given: "auto" or "manual".

    Example:
        >>> AdapterInfo("jo/news-lora", rank=8, metrics={"test/accuracy": 0.9}).license is None
        True
    """

    repo_id: str
    revision: str | None = None
    base_revision: str | None = None
    kind: str | None = None
    rank: int | None = None
    size_bytes: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    data: tuple[str, ...] = ()
    license: str | None = None
    last_modified: datetime | None = None
    private: bool | None = None
    gated: bool | str | None = None


def list_adapters(
    base: str, *, author: str | None = None, limit: int | None = None, token: str | None = None
) -> list[AdapterInfo]:
    """Return the adapters on the Hub whose cards name a model as their base, in the Hub's order.

    Asks for the pages of the list; then for each adapter once for the sizes of its files, and twice for
    `adapter_config.json`, if that is not in the cache at this commit. What an adapter does not state, or states in a
    form that nobody can read, is None; it stays in the list.

    Args:
        base: the base's id on the Hub. Adapters are found by the name in their cards, not by the weights.
        author: only those of this user or organisation.
        limit: at most so many; None: all.
        token: whose private repositories are listed too; what the machine is logged in with if None.

    Raises:
        ValueError: `base` is a local folder or cannot be an id; `limit` is not positive.
        PermissionError: the Hub refuses the token.
        ConnectionError: the Hub did not answer, or offline mode is on.
        OSError: the Hub failed in between; a shorter list would be taken for the whole.

    Example:
        >>> list_adapters("./models/minilm")
        Traceback (most recent call last):
        ValueError: base `./models/minilm` cannot be an id on the Hub; expected `owner/name`: adapters are found by ...
    """
    if not is_repo_id(base) or Path(base).is_dir():
        what = "is a folder here" if is_repo_id(base) else "cannot be an id on the Hub"
        raise ValueError(
            f"base `{base}` {what}; expected `owner/name`: adapters are found by the name that their cards give. Pass "
            "the id under which the base is on the Hub."
        )
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}, expected a positive number; leave it out for all adapters.")
    check_token(token)
    api = HfApi(token=token)
    try:
        # Not `cardData`: one repository's card with hostile keys would break the client's list of all.
        listed = list(
            api.list_models(
                filter=f"base_model:adapter:{base}",
                author=author,
                limit=limit,
                expand=["sha", "lastModified", "private", "gated", "tags", "model-index"],
            )
        )
        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(partial(_describe, api), listed))
    except OfflineModeIsEnabled as error:
        raise ConnectionError(f"the adapters of `{base}` cannot be listed: offline mode is on. Unset it.") from error
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise PermissionError(
                f"the Hub refuses to list the adapters of `{base}`: {error} Pass another token=, or log in with "
                "`hf auth login`."
            ) from error
        raise OSError(f"the Hub failed to list the adapters of `{base}`: {error} Call again.") from error
    except httpx.TransportError as error:
        raise ConnectionError(f"the Hub did not list the adapters of `{base}`: {error} Connect and retry.") from error


def compare_adapters(infos: Iterable[AdapterInfo], *, metric: str | None = None) -> str:
    """Return a Markdown table of adapters, the best first by a metric.

    Higher is better, except for losses and errors. The values are those of the cards: nobody has measured them again,
    and they can be compared only where the data are the same, which the table says.

    Args:
        infos: the adapters.
        metric: a key of their `metrics`, such as "test/accuracy", or "accuracy" where only one key ends so; None: the
            one that most of them state.

    Raises:
        ValueError: none of them states the metric, or several are meant; those that are stated are listed.

    Example:
        >>> print(compare_adapters([AdapterInfo("jo/a", rank=8, metrics={"test/accuracy": 0.9}), AdapterInfo("jo/b")]))
        | Adapter | test/accuracy | Data | Kind | Rank | Size | Licence | Base revision | Changed | Access |
        |---|---|---|---|---|---|---|---|---|---|
        | `jo/a` | 0.9 | not stated | not stated | 8 | not stated | not stated | not stated | not stated | not stated |
        | `jo/b` | not stated | not stated | not stated | not stated | not stated | not stated | not stated | ...
    """
    infos = list(infos)
    stated = Counter(name for info in infos for name in sorted(info.metrics))
    if metric is None:
        metric = min(stated, key=lambda name: (-stated[name], name)) if stated else None
    elif metric not in stated:
        meant = [name for name in stated if name.endswith(f"/{metric}")]
        if len(meant) != 1:
            what = f"{len(meant)} metrics are called `{metric}`" if meant else f"no adapter states `{metric}`"
            known = ", ".join(sorted(meant or stated)) or "(no metrics at all)"
            raise ValueError(f"{what}, expected one of: {known}.")
        metric = meant[0]
    sign = 1 if _lower_is_better(metric) else -1

    def place(info: AdapterInfo) -> tuple[float, str]:
        value = info.metrics.get(metric) if metric else None
        return (math.inf if value is None else sign * value, info.repo_id)

    heads = ["Adapter", *([metric] if metric else []), "Data", "Kind", "Rank", "Size", "Licence"]
    heads += ["Base revision", "Changed", "Access"]
    lines = [[escape(head) for head in heads], ["---"] * len(heads)]
    lines += [_row(info, metric) for info in sorted(infos, key=place)]
    first, rule, *rows = ["|".join(line) if line[0] == "---" else " | ".join(line) for line in lines]
    return "\n".join([f"| {first} |", f"|{rule}|", *(f"| {row} |" for row in rows)])


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command that lists adapters to a parser.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> configure(parser)
        >>> parser.parse_args(["google-bert/bert-base-uncased", "--limit", "5"]).limit
        5
    """
    parser.add_argument("base", help="the base's id on the Hub")
    parser.add_argument("--metric", help="sort by it, such as test/accuracy; the one that most state otherwise")
    parser.add_argument("--author", help="only those of this user or organisation")
    parser.add_argument("--limit", type=int, help="at most so many")


def run(options: argparse.Namespace) -> str:
    """Return what the command prints: the table of the adapters, or that there are none.

    Raises:
        ValueError: as in `list_adapters` and `compare_adapters`.
    """
    infos = list_adapters(options.base, author=options.author, limit=options.limit)
    if not infos:
        return f"No adapter that this token may see names `{options.base}` as its base."
    return compare_adapters(infos, metric=options.metric)


def _describe(api: HfApi, info: ModelInfo) -> AdapterInfo:
    tags = [tag for tag in info.tags or [] if isinstance(tag, str)]
    metrics, data = _metrics(info.model_index)
    sizes = _sizes(api, info.id, info.sha)
    config = _config(info.id, info.sha, api.token) if 0 < sizes.get(CONFIG, 0) <= _LARGEST_CONFIG else {}
    rank = config.get("r")
    return AdapterInfo(
        repo_id=info.id,
        revision=info.sha,
        base_revision=_text(config.get("revision")),
        kind=_text(config.get("peft_type")),
        rank=rank if isinstance(rank, int) and not isinstance(rank, bool) else None,
        size_bytes=next((sizes[name] for name in _WEIGHTS if name in sizes), None),
        metrics=metrics,
        data=data or _tagged(tags, "dataset"),
        license=next(iter(_tagged(tags, "license")), None),
        last_modified=info.last_modified,
        private=info.private,
        gated=info.gated,
    )


def _sizes(api: HfApi, repo_id: str, sha: str | None) -> dict[str, int]:
    """Return the sizes of the files that matter; none if the token may not see them, or they have just gone."""
    try:
        found = api.get_paths_info(repo_id, [CONFIG, *_WEIGHTS], revision=sha)
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403, 404):
            return {}
        raise
    return {entry.path: entry.size for entry in found if isinstance(entry, RepoFile)}


def _config(repo_id: str, sha: str | None, token: Any) -> dict[str, Any]:
    try:
        path = fetch(repo_id, sha or "main", CONFIG, token, optional=True)
        found = json.loads(path.read_text(encoding="utf-8")) if path else {}
    except (PermissionError, ValueError, RecursionError):  # not for this token; no UTF-8, no JSON
        return {}
    return found if isinstance(found, dict) else {}


def _metrics(index: Any) -> tuple[dict[str, float], tuple[str, ...]]:
    """Return the finite results of a card's `model-index`, and the data sets that they are on."""
    try:
        _, results = model_index_to_eval_results(index)
    except (TypeError, KeyError, AttributeError, ValueError):  # missing, or no such list
        return {}, ()
    results = [result for result in results if _number(result.metric_value) is not None]
    names = tuple(dict.fromkeys(str(result.dataset_name) for result in results))
    return {
        "/".join([*([str(result.dataset_name)] if len(names) > 1 else []), *_key(result)]): float(result.metric_value)
        for result in results
    }, names


def _key(result: EvalResult) -> list[str]:
    return [*([str(result.dataset_split)] if result.dataset_split else []), str(result.metric_type)]


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _tagged(tags: Sequence[str], key: str) -> tuple[str, ...]:
    return tuple(tag.removeprefix(f"{key}:") for tag in tags if tag.startswith(f"{key}:"))


def _lower_is_better(metric: str | None) -> bool:
    words = (metric or "").rpartition("/")[2].lower().replace("-", "_").split("_")
    return any(word in _LOWER_IS_BETTER for word in words)


def _row(info: AdapterInfo, metric: str | None) -> list[str]:
    value = info.metrics.get(metric) if metric else None
    access = None if info.private is None else "private" if info.private else "gated" if info.gated else "public"
    cells: list[Any] = [
        *([None if value is None else number(value)] if metric else []),
        ", ".join(info.data) or None,
        info.kind,
        info.rank,
        None if info.size_bytes is None else size(info.size_bytes),
        info.license,
        None if info.base_revision is None else Markdown(cell(info.base_revision[:12])),
        None if info.last_modified is None else info.last_modified.date().isoformat(),
        access,
    ]
    return [cell(info.repo_id), *(NOT_STATED if value is None else escape(value) for value in cells)]
