"""Answering requests: prompt, KV cache, decoder, sampling."""
