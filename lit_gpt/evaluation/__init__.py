"""What a model can do: lm-evaluation-harness, generated answers, GSM8K, the reversal curse, MT-bench."""
