"""One file per block of a model and step; each takes the file and its facts and rewrites one class."""
