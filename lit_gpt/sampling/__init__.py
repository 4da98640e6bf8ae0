"""Sampling of text: settings, the denoising loop and its algorithms, autoregressive sampling, caches, infilling."""
