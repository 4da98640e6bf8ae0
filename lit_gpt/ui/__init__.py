"""What a person sees: terminal, page, plots, and what a file is."""
