"""F1, for `evaluate.load` by local path: no network is needed."""

import datasets
import evaluate
from sklearn.metrics import f1_score

_FEATURES = datasets.Features({"predictions": datasets.Value("int32"), "references": datasets.Value("int32")})


class F1(evaluate.Metric):
    """The mean over classes of the harmonic mean of precision and recall (macro F1), in [0, 1]."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Macro F1: the unweighted mean of the F1 of each class.",
            citation="",
            inputs_description="predictions and references: class numbers, one a text.",
            features=_FEATURES,
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"f1": float(f1_score(references, predictions, average="macro", zero_division=0))}
