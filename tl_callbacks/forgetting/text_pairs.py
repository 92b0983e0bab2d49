"""Retrieval: whether the features still tell which text belongs to which."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from tl_callbacks.forgetting.measures import Measure
from tl_callbacks.forgetting.models import last_hidden_states
from tl_callbacks.forgetting.readings import Reading
from tl_callbacks.forgetting.retrieval import recall_at
from tl_callbacks.forgetting.texts import padded, tokenised, tokenizer_of
from tl_callbacks.groups import LayerGroups
from tl_callbacks.probing.passes import Part
from tl_callbacks.probing.rows import Source, Step, called, chosen_places, forwards, takes
from tl_callbacks.reading.pooling import Pooling, pool


class Retrieval(Measure):
    """Recall@k of text pairs: how often a query's own document is among the k nearest of all documents, by cosine.

    Such as the first line of a docstring and its body. A text is the pooled last hidden states of the model below its
    head (of a model that is no class of transformers, what its head group is given), or what a SentenceTransformer
    makes of it. Queries look for documents, not the other way round; equally near
    documents share the place. Retention is now / base. Chance is k / n, so a pretrained model must find far more than
    that for retention to say anything.

    Args:
        pairs: (query, document), texts or tokenised rows, or mappings of which the first two values count.
        k: documents that count, 1 or more.
        pooling: "mean" (sentence models), "first" (a class token) or "last" (decoders).
        tokenizer: for texts; None: the Trainer's `processing_class`.
        max_length: tokens of a text.
        max_rows: pairs that are read, drawn at random; all their documents are searched.
        seed: of the pairs.
        name: under which it is logged.

    Raises:
        ValueError: a number is out of range, or `pooling` is unknown.

    Example:
        >>> Retrieval([("Sort a list.", "Returns a new list."), ("Open a file.", "Returns a file object.")])
        Retrieval(pairs=2, k=1, pooling='mean')
    """

    def __init__(
        self,
        pairs: Any,
        *,
        k: int = 1,
        pooling: Pooling = "mean",
        tokenizer: Any = None,
        max_length: int = 128,
        max_rows: int = 1000,
        seed: int = 0,
        name: str = "retrieval",
    ) -> None:
        super().__init__(name, max_rows=max_rows, seed=seed)
        if k < 1:
            raise ValueError(f"`k` is {k}; expected 1 or more.")
        if pooling not in ("mean", "first", "last"):
            raise ValueError(f'`pooling` is {pooling!r}; expected "mean", "first" or "last".')
        self.pairs = pairs
        self.k = k
        self.pooling = pooling
        self.tokenizer = tokenizer
        self.max_length = max_length

    def __repr__(self) -> str:
        return f"Retrieval(pairs={len(self.pairs)}, k={self.k}, pooling={self.pooling!r})"

    @property
    def definitions(self) -> dict[str, str]:
        """The recall."""
        return {self.name: f"recall@{self.k}, query to document, by cosine; retention: now / before"}

    @property
    def rows(self) -> int:
        """Pairs that are read."""
        return super().rows // 2

    def prepare(self, trainer: Trainer) -> None:
        """Tokenise the texts: all queries, then all documents."""
        if getattr(getattr(trainer.model, "config", None), "is_encoder_decoder", False):
            raise ValueError("Retrieval reads models of one stack; an encoder-decoder has two. Leave it out.")
        places = chosen_places(self.pairs, self.max_rows, self.seed).tolist()
        if len(places) <= self.k:
            raise ValueError(f"there are {len(places)} pairs and k={self.k}; expected more pairs than k.")
        tokenizer = tokenizer_of(trainer, self.tokenizer)
        sides = [_both(self.pairs[place]) for place in places]
        rows = []
        for text in [pair[0] for pair in sides] + [pair[1] for pair in sides]:
            samples = tokenised(text, tokenizer, self.max_length)
            if len(samples) != 1:
                raise ValueError(f"a text gives {len(samples)} samples; expected one with tokens: {str(text)[:60]!r}.")
            rows.append(samples[0])
        pad = getattr(tokenizer, "pad_token_id", None) or 0
        self._source = Source(
            rows, torch.arange(len(rows)), lambda batch: padded(batch, pad), trainer.args.per_device_eval_batch_size,
            drop_columns=False, context=trainer.accelerator.autocast,
        )  # fmt: skip

    def read(self, model: nn.Module, groups: LayerGroups, *, base: bool, rank: int, ranks: int) -> Part:
        """Return the pooled features of this rank's texts."""
        assert self._source is not None
        hidden: list[Tensor] = []
        found: list[Tensor] = []

        def take(step: Step) -> None:
            if not hidden:
                raise ValueError(
                    f"{self.name}: no hidden states were found. Give ForgettingMonitor the model's groups."
                )
            states, rows = hidden.pop(), len(step.places)
            mask = step.batch["attention_mask"].to(states.device)
            prompts = states.shape[1] - mask.shape[1] if states.ndim == 3 else 0
            pooled = pool(states[:, prompts:] if prompts > 0 else states, rows, mask, pooling=self.pooling)
            if pooled is None:
                raise ValueError(
                    f"{self.name}: hidden states of shape {tuple(states.shape)} are not those of {rows} rows."
                )
            found.append(pooled.cpu())

        embeds = "input_ids" not in takes(model) and hasattr(model, "encode")

        def call(batch: dict[str, Tensor]) -> None:
            if embeds:  # a SentenceTransformer, which takes the batch as it is, pools, and maybe projects
                hidden.append(model(dict(batch))["sentence_embedding"])
            else:
                called(model, batch, labels=False)

        with nullcontext() if embeds else last_hidden_states(model, groups, hidden.append):
            places, kept = forwards(model, self._source, take, call=call, seed=self.seed, rank=rank, ranks=ranks)
        return Part(places[kept], {"features": torch.cat(found)[kept]})

    def score(self, part: Part) -> dict[str, Reading]:
        """Return the recall of all queries among all documents."""
        queries, documents = part.features["features"].chunk(2)
        hits = recall_at(queries, documents, self.k)
        return {self.name: Reading(hits, torch.ones_like(hits), "score", self.k / len(hits))}


def _both(pair: Any) -> Sequence[Any]:
    sides = list(pair.values())[:2] if isinstance(pair, Mapping) else pair
    if isinstance(sides, str) or not isinstance(sides, Sequence) or len(sides) != 2:
        raise TypeError(f"expected pairs (query, document), got {str(pair)[:60]!r}.")
    return sides
