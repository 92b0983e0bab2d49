"""The rule: each layer group's learning rate as a ratio to the base rate. No torch."""

from collections.abc import Mapping

from tl_callbacks.groups import LayerGroups


def layer_scales(
    groups: LayerGroups,
    *,
    decay: float | Mapping[str, float] = 1.0,
    head_factor: float = 1.0,
    factors: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Return each group's learning rate as a ratio to `args.learning_rate`.

    Layer-wise decay: the top level has ratio 1, each level below it `decay` times the one above, so that
    `scale[i] = decay ** (len(levels) - 1 - i)`. A level is one group, or the groups of parallel towers at one depth
    from the output; with one number per tower each tower has its own decay. The head's ratio is multiplied by
    `head_factor`: with `decay=1` that is differential learning rates (one for the backbone, one for the head).
    ULMFiT's discriminative fine-tuning is `decay=1 / 2.6`; 0.9 is usual for deep transformers. `factors` replaces the
    result where its patterns match.

    Args:
        groups: the groups, bottom to top.
        decay: ratio of neighbouring levels, in (0, 1]; or anchored patterns of group or tower names to such ratios, 1
            where none matches.
        head_factor: ratio of the head to what it would have, above 0.
        factors: anchored patterns of group names to ratios, 0 or above; the last match wins.

    Returns:
        Group name to ratio, bottom to top.

    Raises:
        ValueError: a number is out of range, a pattern matches no group, or `head_factor` is set where no head is.

    Example:
        >>> from tl_callbacks.groups import LayerGroup
        >>> groups = LayerGroups(tuple(LayerGroup(name, (name,)) for name in ("low", "high", "head")), "head")
        >>> layer_scales(groups, decay=0.5, head_factor=4)
        {'low': 0.25, 'high': 0.5, 'head': 4.0}

    References:
        Howard and Ruder, "Universal Language Model Fine-tuning for Text Classification", ACL 2018, section 3.2.
        https://arxiv.org/abs/1801.06146
        Clark et al., "ELECTRA", ICLR 2020, appendix B. https://arxiv.org/abs/2003.10555
    """
    decays = groups.by_group(decay, default=1.0)
    for value in decays.values():
        if not 0 < value <= 1:
            raise ValueError(
                f"`decay` is {value}; expected a ratio above 0 and at most 1, from one group to the one below. "
                "ULMFiT's 2.6 is decay=1 / 2.6."
            )
    if head_factor <= 0:
        raise ValueError(f"`head_factor` is {head_factor}; expected a number above 0. To hold the head, use `factors`.")
    if head_factor != 1 and groups.head is None:
        raise ValueError(
            f"`head_factor` is {head_factor}, but the model has no head of its own (its last group is "
            f"`{groups.names[-1]}`). Leave it at 1 or name the groups in `factors`."
        )
    top = len(groups.levels) - 1
    scales = {
        group.name: decays[group.name] ** (top - number)
        for number, level in enumerate(groups.levels)
        for group in level
    }
    if groups.head is not None:
        scales[groups.head] *= head_factor
    for pattern, factor in (factors or {}).items():
        if factor < 0:
            raise ValueError(f"the factor of `{pattern}` is {factor}; expected 0 or more, a ratio to the base rate.")
        scales |= dict.fromkeys(groups.select([pattern]), float(factor))
    return scales
