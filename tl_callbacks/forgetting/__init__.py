"""What was lost? The pretrained model's abilities, measured again while it is fine-tuned."""

from tl_callbacks.forgetting.callback import ForgettingMonitor
from tl_callbacks.forgetting.continual import TaskMatrix
from tl_callbacks.forgetting.language import cross_entropies, divergences, predicted
from tl_callbacks.forgetting.language_modelling import LanguageModelling
from tl_callbacks.forgetting.measures import Measure
from tl_callbacks.forgetting.retrieval import recall_at
from tl_callbacks.forgetting.source_task import SourceTask
from tl_callbacks.forgetting.text_pairs import Retrieval

__all__ = [
    "ForgettingMonitor",
    "LanguageModelling",
    "Measure",
    "Retrieval",
    "SourceTask",
    "TaskMatrix",
    "cross_entropies",
    "divergences",
    "predicted",
    "recall_at",
]
