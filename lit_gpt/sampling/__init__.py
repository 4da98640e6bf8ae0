"""How text is written: settings, the denoising loop, samplers, caches, infilling."""
