"""MT-bench: questions, answers, judgments and tables, in FastChat's formats."""
