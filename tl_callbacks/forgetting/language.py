"""The operations behind language modelling: which tokens are predicted, at what cost, how far from the base."""

from collections.abc import Iterator

import torch
from torch import Tensor

_CHUNK = 1 << 23  # logits that are turned into probabilities at a time


def predicted(labels: Tensor, *, shifted: bool, mask: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
    """Return which tokens a model predicts, (rows, length) like the labels.

    Those with a label, -100 being none. Of a causal model each token is predicted by the place before it, so the first
    of a row never is, nor one whose place before is padding, on whichever side that stands, or another sample's last.

    Args:
        labels: (rows, length), -100 where a token does not count.
        shifted: whether place t predicts the label of t + 1 (causal) rather than its own (masked, encoder-decoder).
        mask: (rows, length), 0 where a place is padding.
        segments: (rows, length), the sample of each place of packed rows.

    Example:
        >>> predicted(torch.tensor([[5, 6, -100, 7]]), shifted=True).tolist()
        [[False, True, False, True]]
        >>> left = torch.tensor([[0, 0, 1, 1]])
        >>> predicted(torch.tensor([[5, 6, 7, 8]]), shifted=True, mask=left).tolist()
        [[False, False, False, True]]
    """
    counts = labels != -100
    if mask is not None:
        counts = counts & (mask != 0)
    if not shifted:
        return counts
    counts = counts.clone()
    counts[:, 0] = False
    if mask is not None:
        counts[:, 1:] &= mask[:, :-1] != 0
    if segments is not None:
        counts[:, 1:] &= segments[:, 1:] == segments[:, :-1]
    return counts


def predicting(values: Tensor, counts: Tensor, *, shifted: bool) -> Tensor:
    """Return what stands where the counted tokens are predicted, (tokens, ...): logits, or hidden states.

    Args:
        values: (rows, length, ...), or longer where soft prompts stand before the tokens.
        counts: (rows, length), of `predicted`.
        shifted: as there.

    Example:
        >>> values = torch.tensor([[[1.0], [2.0], [3.0]]])
        >>> predicting(values, torch.tensor([[False, True, True]]), shifted=True).tolist()
        [[1.0], [2.0]]
    """
    values = values[:, values.shape[1] - counts.shape[1] :]
    return values[:, :-1][counts[:, 1:]] if shifted else values[counts]


def cross_entropies(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of each token, (tokens,), in nats, float64; -log p(target).

    Probabilities are computed in float32 at least, a chunk of tokens at a time.

    Args:
        logits: (tokens, vocabulary).
        targets: (tokens,), ids.

    Example:
        >>> cross_entropies(torch.zeros(1, 4), torch.tensor([2])).tolist() == [torch.tensor(4.0).log().item()]
        True
    """
    found = logits.new_zeros(len(logits), dtype=torch.float64)
    for rows in _chunks(logits):
        found[rows] = -_log_probabilities(logits[rows]).gather(1, targets[rows, None])[:, 0].double()
    return found


def divergences(base: Tensor, tuned: Tensor) -> Tensor:
    """Return KL(base || tuned) of each token, (tokens,), in nats, float64.

    That is the sum of p_base (log p_base - log p_tuned) over the vocabulary; what the base rules out adds nothing.

    Args:
        base: (tokens, vocabulary), logits.
        tuned: the same shape.

    Raises:
        ValueError: the shapes differ, as where the vocabulary was resized.

    Example:
        >>> logits = torch.tensor([[0.0, 1.0, 2.0]])
        >>> divergences(logits, logits + 3).tolist()
        [0.0]
    """
    if base.shape != tuned.shape:
        raise ValueError(
            f"the base has logits of shape {tuple(base.shape)} and the tuned model {tuple(tuned.shape)}; expected one "
            "shape. Where the vocabulary was resized after attach(trainer), resize it before."
        )
    found = base.new_zeros(len(base), dtype=torch.float64)
    for rows in _chunks(base):
        log_p, log_q = _log_probabilities(base[rows]), _log_probabilities(tuned[rows])
        terms = torch.where(log_p == -torch.inf, 0.0, log_p.exp() * (log_p - log_q))
        found[rows] = terms.sum(1, dtype=torch.float64).clamp(min=0)  # below 0 by rounding alone
    return found


def fixed_mask(ids: Tensor, special: Tensor, *, share: float, seed: int, place: int) -> Tensor:
    """Return the same tokens of a row each time, (length,), to be masked: a share of those that are no special ones.

    At least one, if there is any.

    Args:
        ids: (length,).
        special: (length,), true where a token is special, such as [CLS] and padding.
        share: in (0, 1].
        seed: of all rows.
        place: the row's number in the data set.

    Example:
        >>> ids = torch.arange(10)
        >>> masked = fixed_mask(ids, ids == 0, share=0.15, seed=0, place=3)
        >>> int(masked.sum()), bool(masked[0])
        (1, False)
    """
    open_ = (~special).nonzero()[:, 0]
    count = max(1, round(share * len(open_)))
    chosen = drawn(len(open_), count, seed=seed, place=place)
    found = torch.zeros(len(ids), dtype=torch.bool)
    found[open_[chosen]] = True
    return found


def drawn(count: int, most: int, *, seed: int, place: int) -> Tensor:
    """Return as many numbers below `count` as may be, ascending, drawn at random but for a row always the same.

    Example:
        >>> drawn(3, 5, seed=0, place=7).tolist()
        [0, 1, 2]
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + place) % (1 << 63))
    return torch.randperm(count, generator=generator)[:most].sort().values


def _chunks(logits: Tensor) -> Iterator[slice]:
    step = max(1, _CHUNK // logits.shape[1])
    return (slice(start, start + step) for start in range(0, len(logits), step))


def _log_probabilities(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1)
