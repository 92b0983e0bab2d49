"""Tasks by the Hub's pipeline tags."""

PURPOSES = {
    "text-classification": "assigns a text to one of its classes",
    "image-classification": "assigns an image to one of its classes",
    "fill-mask": "fills a gap in a text",
    "token-classification": "labels the tokens of a text",
    "question-answering": "marks the answer to a question in a text",
    "text-generation": "continues a text",
    "text2text-generation": "rewrites a text",
    "summarization": "summarises a text",
}
# Pipeline tags by what follows `For` in the name of a class, where it leaves no doubt.
_BY_CLASS = {
    "SequenceClassification": "text-classification",
    "TokenClassification": "token-classification",
    "QuestionAnswering": "question-answering",
    "ImageClassification": "image-classification",
    "CausalLM": "text-generation",
    "MaskedLM": "fill-mask",
}


def task_of(class_name: str) -> str | None:
    """Return the pipeline tag of a model's class, None where its name leaves a doubt.

    Example:
        >>> task_of("BertForSequenceClassification"), task_of("BartForConditionalGeneration")
        ('text-classification', None)
    """
    return _BY_CLASS.get(class_name.partition("For")[2])
