"""Held-out language modelling: what texts of the pretrained model's domain cost now, and how far its answers moved."""

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from tl_callbacks.fingerprints import base_model
from tl_callbacks.forgetting.language import (
    cross_entropies,
    divergences,
    drawn,
    fixed_mask,
    predicted,
    predicting,
)
from tl_callbacks.forgetting.measures import Measure
from tl_callbacks.forgetting.models import answered, last_hidden_states, logits_in, own_head_finding
from tl_callbacks.forgetting.readings import Reading
from tl_callbacks.forgetting.texts import Labels, Row, padded, tokenised, tokenizer_of
from tl_callbacks.groups import LayerGroups
from tl_callbacks.probing.evaluation import Collate
from tl_callbacks.probing.passes import Part
from tl_callbacks.probing.rows import Source, Step, called, chosen_places, forwards, takes
from tl_callbacks.reading.pooling import packed_segments

LanguageKind = Literal["causal", "masked", "seq2seq"]


class LanguageModelling(Measure):
    """Cross-entropy of held-out text, in nats a token, and KL(base || tuned) to the pretrained model's answers.

    Each token counts once, whatever the batch it stands in; a causal model's labels are shifted by one place, and no
    token is predicted from padding or across the samples of a packed row. A masked model is given the same masked
    tokens each time: `mask_share` of each row without special tokens, all replaced by the mask token. Retention is
    exp(base - now), the ratio of the perplexities. The KL needs no labels: it sees what the tuned model would say
    otherwise, also where that costs nothing. It is measured on `kl_tokens` tokens, drawn evenly from the rows and
    weighted by their lengths, of which the pretrained model's logits are kept on the CPU: 4 bytes x `kl_tokens` x
    vocabulary in float32, all ranks together, 125 MB at 30,000 words.

    Args:
        rows: texts of the pretrained model's domain, or tokenised rows; `labels` in a row, one for each token, count
            instead of its tokens, -100 none. Not what is trained on.
        kind: "causal", "masked" or "seq2seq" (rows with `labels`); None: that of the model's class.
        head: where the model is trained with another head, the language model's: takes last hidden states, gives
            logits, such as `BertForMaskedLM.from_pretrained(...).cls`.
        tokenizer: for texts and for the mask; None: the Trainer's `processing_class`.
        max_length: tokens of a sample.
        max_rows: rows that are read, drawn at random.
        kl_tokens: tokens of the KL; 0: it is not measured.
        mask_share: of a masked model's tokens, in (0, 1].
        collate: makes a batch of rows as they are, instead of padding them here.
        seed: of rows, masks and tokens.
        name: under which it is logged.

    Raises:
        ValueError: a number is out of range, or `kind` is unknown.

    Example:
        >>> LanguageModelling(["The first text.", "The second."], max_length=64)
        LanguageModelling(rows=2, kind=None)

    References:
        Biderman et al., "LoRA Learns Less and Forgets Less", TMLR 2024. https://arxiv.org/abs/2405.09673
    """

    def __init__(
        self,
        rows: Any,
        *,
        kind: LanguageKind | None = None,
        head: nn.Module | None = None,
        tokenizer: Any = None,
        max_length: int = 128,
        max_rows: int = 500,
        kl_tokens: int = 1024,
        mask_share: float = 0.15,
        collate: Collate | None = None,
        seed: int = 0,
        name: str = "language",
    ) -> None:
        super().__init__(name, max_rows=max_rows, seed=seed)
        if kind is not None and kind not in get_args(LanguageKind):
            raise ValueError(f'`kind` is {kind!r}; expected "causal", "masked", "seq2seq" or None.')
        if max_length < 2 or kl_tokens < 0:
            raise ValueError(
                f"`max_length` is {max_length} and `kl_tokens` {kl_tokens}; expected 2 or more, and 0 or more."
            )
        if not 0 < mask_share <= 1:
            raise ValueError(f"`mask_share` is {mask_share}; expected a share in (0, 1], such as 0.15.")
        self.given = rows
        self.kind = kind
        self.head = head
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.kl_tokens = kl_tokens
        self.mask_share = mask_share
        self.collate = collate
        self._kind: LanguageKind = "causal"

    def __repr__(self) -> str:
        return f"LanguageModelling(rows={len(self.given)}, kind={self.kind!r})"

    @property
    def definitions(self) -> dict[str, str]:
        """The cross-entropy and the divergence."""
        found = {self.name: "cross-entropy of held-out text, nats a token; retention: exp(before - now)"}
        return {**found, f"{self.name}_kl": "KL(before || now), nats a token"} if self.kl_tokens else found

    def findings(self, trainer: Trainer) -> list[str]:
        """Return what would go wrong: rows that cannot be read, a head that trains or is missing."""
        return super().findings(trainer) + own_head_finding(trainer, self.head, self.name)

    def prepare(self, trainer: Trainer) -> None:
        """Tokenise the rows and mask them."""
        assert trainer.model is not None
        places = chosen_places(self.given, self.max_rows, self.seed)
        self._kind = self.kind or _kind_of(trainer.model, self.head)
        if self._kind == "seq2seq" and self.head is not None:
            raise ValueError("`head` stands on an encoder or a decoder alone; expected none with kind='seq2seq'.")
        tokenizer = tokenizer_of(trainer, self.tokenizer)
        dataset, collate = self.given, self.collate
        if collate is None:
            labels: Labels = "target" if self._kind == "seq2seq" else "tokens"
            given = (tokenised(self.given[n], tokenizer, self.max_length, labels=labels) for n in places.tolist())
            dataset = [row for rows in given for row in rows]
            dataset, places = self._labelled(dataset, tokenizer), torch.arange(len(dataset))
            pad = getattr(tokenizer, "pad_token_id", None)
            collate = lambda rows: padded(rows, pad or 0)  # noqa: E731
        if len(places) == 0:
            raise ValueError("there are no rows with tokens; expected texts of the pretrained model's domain.")
        self._source = Source(
            dataset, places, collate, trainer.args.per_device_eval_batch_size, drop_columns=False,
            context=trainer.accelerator.autocast,
        )  # fmt: skip

    def _labelled(self, rows: list[Row], tokenizer: Any) -> list[Row]:
        if self._kind == "seq2seq" and not all("labels" in row for row in rows):
            raise ValueError("an encoder-decoder is measured on rows with `input_ids` and `labels`; some have none.")
        if self._kind == "masked":
            return [row if "labels" in row else self._masked(row, n, tokenizer) for n, row in enumerate(rows)]
        return [row if "labels" in row else {**row, "labels": row["input_ids"]} for row in rows]

    def _masked(self, row: Row, place: int, tokenizer: Any) -> Row:
        if getattr(tokenizer, "mask_token_id", None) is None:
            raise ValueError(
                "a masked model needs a tokenizer that has a mask token. Pass tokenizer=..., or processing_class= to "
                "the Trainer, or rows with `labels`, -100 where nothing is masked."
            )
        ids = torch.tensor(row["input_ids"])
        special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
        for key, out in (("special_tokens_mask", 1), ("attention_mask", 0)):
            if key in row:
                special |= torch.tensor(row[key]) == out
        masked = fixed_mask(ids, special, share=self.mask_share, seed=self.seed, place=place)
        hidden, labels = ids.masked_fill(masked, tokenizer.mask_token_id), ids.masked_fill(~masked, -100)
        return {
            **row,
            "input_ids": hidden.tolist(),
            "labels": labels.tolist(),
        }

    def read(self, model: nn.Module, groups: LayerGroups, *, base: bool, rank: int, ranks: int) -> Part:
        """Return cross-entropies and divergences of this rank's rows; of the pretrained model, keep its logits."""
        assert self._source is not None
        if base:
            self.kept = {}
        reader = _Reader(self, self._source, kind=self._kind, base=base)
        call = lambda batch: called(model, self._inputs(model, batch), labels=self._kind == "seq2seq")  # noqa: E731
        if self.head is not None:
            self.head.to(next(model.parameters()).device).eval()
        with last_hidden_states(model, groups, reader.hear):
            places, kept = forwards(model, self._source, reader.take, call=call, seed=self.seed, rank=rank, ranks=ranks)
        return Part(places[kept], {"sums": torch.cat(reader.found)[kept]})

    def score(self, part: Part) -> dict[str, Reading]:
        """Return the cross-entropy and the divergence of all rows."""
        nats, tokens, divergence, weights = part.features["sums"].unbind(1)
        found = {self.name: Reading(nats, tokens, "loss")}
        return {**found, f"{self.name}_kl": Reading(divergence, weights, "divergence")} if self.kl_tokens else found

    @staticmethod
    def _inputs(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
        return {**batch, "use_cache": False} if "use_cache" in takes(model) else dict(batch)


class _Reader:
    """Takes the forwards of one pass: by row nats, tokens, weighted divergences, and their weights."""

    def __init__(self, measure: LanguageModelling, source: Source, *, kind: LanguageKind, base: bool) -> None:
        self.measure = measure
        self.kind = kind
        self.shifted = kind == "causal"
        self.base = base
        self.found: list[Tensor] = []
        self._hidden: Tensor | None = None
        rows = len(source.places)
        self._each = max(1, measure.kl_tokens // rows) if measure.kl_tokens else 0  # tokens of a row
        stride = -(-rows // measure.kl_tokens) if measure.kl_tokens else 1
        self._of_divergence = set(source.places[::stride].tolist())

    def hear(self, hidden: Tensor) -> None:
        self._hidden = hidden

    def take(self, step: Step) -> None:
        batch = step.batch
        mask = batch.get("attention_mask")
        mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        if not self.shifted and "labels" not in batch:
            raise ValueError("`collate` makes batches without `labels`, which tell what a masked model is asked for.")
        labels = batch["labels"] if "labels" in batch else batch["input_ids"]
        _check(labels, None if self.kind == "seq2seq" else batch.get("input_ids"), len(step.places))
        segments = packed_segments(batch.get("position_ids"), batch.get("cu_seq_lens_q")) if mask is None else None
        if not self.shifted:
            mask = None  # an encoder's, which is not that of a decoder's labels; they say themselves what counts
        counts = predicted(labels, shifted=self.shifted, mask=mask, segments=segments)
        logits = self._logits(step.output, counts)
        rows = counts.nonzero()[:, 0]
        nats = cross_entropies(logits, labels[counts].to(logits.device)).cpu()
        sums = torch.zeros(len(labels), 4, dtype=torch.float64)
        sums[:, 0].index_add_(0, rows, nats)
        sums[:, 1] = counts.sum(1)
        for row, place in enumerate(step.places.tolist()):
            if self._each and place in self._of_divergence:
                own = (rows == row).nonzero()[:, 0]
                chosen = own[drawn(len(own), self._each, seed=self.measure.seed, place=place)]
                sums[row, 2:] = self._divergence(place, logits[chosen.to(logits.device)], len(own))
        self.found.append(sums)

    def _divergence(self, place: int, logits: Tensor, tokens: int) -> Tensor:
        """Return the divergence of a row, as its tokens' mean times their number, and that number."""
        if self.base:
            self.measure.kept[place] = logits.cpu().clone()
        mean = divergences(self.measure.kept[place].to(logits.device), logits).mean() if len(logits) else 0.0
        return torch.tensor([float(mean) * tokens, tokens], dtype=torch.float64)

    def _logits(self, output: Any, counts: Tensor) -> Tensor:
        head = self.measure.head
        values = logits_in(output) if head is None else self._hidden
        if values is None or values.ndim != 3:
            advice = "the language model's head as `head=`" if head is None else "groups whose head takes hidden states"
            raise ValueError(
                f"expected {'logits' if head is None else 'hidden states'} of each token, (rows, length, ...), got "
                f"{None if values is None else tuple(values.shape)}. Give {advice}."
            )
        picked = predicting(values, counts.to(values.device), shifted=self.shifted)
        found: Tensor = picked if head is None else logits_in(answered(head, picked))
        return found


def _check(labels: Tensor, ids: Tensor | None, rows: int) -> None:
    """Raise if a batch of a `collate` of one's own is not a row for each, and a label for each token."""
    if labels.ndim != 2 or len(labels) != rows or (ids is not None and labels.shape != ids.shape):
        got = f"labels of shape {tuple(labels.shape)}" + (f" for {tuple(ids.shape)} tokens" if ids is not None else "")
        raise ValueError(
            f"`collate` makes {got} of {rows} rows; expected (rows, length), a row for each and a label for each "
            "token. Leave `collate` out, and rows are padded here; the class of a row is no label of its tokens."
        )


def _kind_of(model: nn.Module, head: nn.Module | None) -> LanguageKind:
    base = base_model(model)
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False) and head is None:
        return "seq2seq"
    own = {kind.__name__ for kind in type(base).__mro__}  # FSDP2 puts a class of its own before the model's
    if own & {*MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()}:
        return "masked"
    if own & {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()}:
        return "causal"
    also = ", and give the language model's head as `head=` if its own is another one" if head is None else ""
    raise ValueError(
        f'{type(base).__name__} is no language model by its class. Say which it is by kind="causal" or kind="masked"'
        f"{also}."
    )
