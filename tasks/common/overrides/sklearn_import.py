"""Keep Transformers from importing scikit-learn, with pandas and scipy.stats, which only assisted generation uses.

`install` must run before the first import of a model: the import is a fifth of the time that a stage needs to start
(docs/explanation/training.md#replaced-library-code), and a pipeline starts about twenty stages.

Replaces: transformers.utils.is_sklearn_available (transformers 5.5)
Delete when: transformers.generation.candidate_generator imports scikit-learn in the function that needs it.
"""


def install() -> None:
    """Report scikit-learn as absent to all modules of Transformers that are imported from now on."""
    from transformers import utils

    utils.is_sklearn_available = lambda: False
