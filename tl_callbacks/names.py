"""Parameter names: without what wrappers add, matched by anchored patterns, with near names for errors."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence

# What wrappers add to a parameter's name: DDP, FSDP, torch.compile, activation checkpointing, PEFT.
_WRAPPER_PARTS = ("_fsdp_wrapped_module.", "_orig_mod.", "_checkpoint_wrapped_module.")
_WRAPPER_PREFIXES = ("module.", "base_model.model.")


def normalise(name: str) -> str:
    """Return a parameter's name without what DDP, FSDP, `torch.compile` and PEFT add to it.

    Example:
        >>> normalise("module.base_model.model.encoder.q.lora_A.default.weight")
        'encoder.q.lora_A.weight'
    """
    for part in _WRAPPER_PARTS:
        name = name.replace(part, "")
    for prefix in _WRAPPER_PREFIXES:
        name = name.removeprefix(prefix)
    return re.sub(r"\.default(?=\.|$)", "", name)


def closest(name: str, candidates: Iterable[str], *, count: int = 3) -> str:
    """Return the nearest candidates as a comma-separated text for an error message.

    Example:
        >>> closest("graduel", ["gradual", "full"])
        '`gradual`'
    """
    candidates = list(candidates)
    near = difflib.get_close_matches(name, candidates, n=count, cutoff=0.5) or candidates[:count]
    return ", ".join(f"`{candidate}`" for candidate in near)


def matches(pattern: str, name: str) -> bool:
    """Return whether `pattern` names the parameter or group `name`, or a module above it.

    Patterns are anchored at both ends and at dots: `layer.1` matches `layer.1` and `layer.1.weight`, never
    `layer.10`. `*` stands for any characters within one part of the name, `**` for any number of parts.

    Example:
        >>> matches("encoder.layer.1", "encoder.layer.1.output.weight")
        True
        >>> matches("encoder.layer.1", "encoder.layer.10.output.weight")
        False
        >>> matches("**.bias", "encoder.layer.10.output.bias")
        True
    """
    parts = re.split(r"(\*\*\.|\*\*|\*)", pattern)
    expressions = {"**.": r"(?:.*\.)?", "**": r".*", "*": r"[^.]*"}
    expression = "".join(expressions.get(part, re.escape(part)) for part in parts)
    return re.fullmatch(expression + r"(?:\..*)?", name) is not None


def assign(parameters: Sequence[str], patterns: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Return the parameters that each pattern takes; each parameter must match exactly one.

    Args:
        parameters: parameter names.
        patterns: result name to anchored pattern.

    Raises:
        ValueError: a parameter matches none or several patterns, or a pattern matches nothing.

    Example:
        >>> assign(["a.weight", "b.weight"], {"low": "a", "high": "b"})
        {'low': ('a.weight',), 'high': ('b.weight',)}
    """
    for parameter in parameters:
        takers = [new for new, pattern in patterns.items() if matches(pattern, parameter)]
        if len(takers) != 1:
            how = "no pattern" if not takers else f"{len(takers)} patterns ({', '.join(takers)})"
            raise ValueError(
                f"parameter `{parameter}` is matched by {how}; expected exactly one. "
                f"Patterns: {', '.join(f'`{pattern}`' for pattern in patterns.values())}."
            )
    result = {
        new: tuple(parameter for parameter in parameters if matches(pattern, parameter))
        for new, pattern in patterns.items()
    }
    for new, found in result.items():
        if not found:
            raise ValueError(
                f"pattern `{patterns[new]}` matches no parameter. Closest names: {closest(patterns[new], parameters)}."
            )
    return result
