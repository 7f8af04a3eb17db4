"""Sequences of token ids: the cache, the forward pass over many of them at once, sampling, generation. No
text here."""
