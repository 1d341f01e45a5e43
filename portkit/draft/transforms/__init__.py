"""One file per block of a model and step: each rewrites one class, from the facts."""
