"""Text to batches: the packed format, its preparation, fine-tuning data, batching."""
