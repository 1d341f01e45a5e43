"""A function for vLLM's workers, in a module of its own: they import it by name."""

import sys


def class_and_file(model):
    """Return module, class name and file of the model that is really served."""
    cls = type(model)
    return cls.__module__, cls.__qualname__, sys.modules[cls.__module__].__file__
