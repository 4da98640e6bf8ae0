"""Models and runs on disk, in and out."""
