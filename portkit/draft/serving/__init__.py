"""Reduces Transformers' code to what a server calls: one forward, without caches, masks, losses.

vLLM passes a model `input_ids`, `positions` and perhaps `inputs_embeds`; every other argument of
the original keeps its default. Following those defaults through the calls folds cross attention,
cache updates and outputs for training, exactly, whatever they are called.
"""
