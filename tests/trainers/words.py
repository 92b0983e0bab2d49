"""A tokenizer made here, rows of words, and what the tests of all trainers look at."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, TrainerCallback

from tl_callbacks import LayerGroups
from tl_callbacks.parameters import parameters_by_name

WORDS = ("red", "green", "blue", "fish", "dog", "bird", "walks", "runs", "swims")
VOCABULARY = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS)


def tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words; `special` names tokens beside [PAD] and [UNK]."""
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16, **special
    )


def bert_folder(folder: Path, *, layers: int = 3, dropout: float = 0.1) -> str:
    """A folder with a tiny encoder and its tokenizer, as `save_pretrained` writes them."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(VOCABULARY), hidden_size=16, num_hidden_layers=layers, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=16, hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    tokenizer(cls_token="[CLS]", sep_token="[SEP]").save_pretrained(folder)
    return str(folder)


def texts(count: int, *, seed: int = 0, length: int = 3) -> list[str]:
    """Texts of random words."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, len(WORDS), (count, length), generator=generator).tolist()
    return [" ".join(WORDS[number] for number in row) for row in rows]


class Steps(TrainerCallback):
    """Copies of parameters at the beginning of training and after each step.

    Args:
        module: the module whose parameters are watched.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.states: list[dict[str, torch.Tensor]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._copy()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._copy()

    def _copy(self) -> None:
        self.states.append({n: p.detach().clone() for n, p in parameters_by_name(self.module).items()})

    def moved_in(self, step: int) -> set[str]:
        """Names of the parameters that a step, counted from 0, has changed."""
        before, after = self.states[step], self.states[step + 1]
        return {name for name in before if not torch.equal(before[name], after[name])}


def check_openings(steps: Steps, groups: LayerGroups, openings: Mapping[str, int]) -> None:
    """Check that each group rests, bit for bit, until the step of its opening, and moves from there on.

    Args:
        steps: what was watched.
        groups: the layer groups.
        openings: group name to the step before which it opens; groups that are not named never open.
    """
    last = len(steps.states) - 1
    assert set(openings) <= set(groups.names)
    assert last > max(openings.values())
    for group in groups:
        for step in range(last):
            moved = steps.moved_in(step) & set(group.parameters)
            assert bool(moved) == (step >= openings.get(group.name, last)), (group.name, step, sorted(moved)[:2])


def assert_left_as_found(model: nn.Module) -> None:
    """Check that we left no hook, nothing frozen and no part in another mode than the whole."""
    for module in model.modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        assert not [hook for hook in hooks if hook.__module__.startswith("tl_callbacks")]
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert len({module.training for module in model.modules()}) == 1
