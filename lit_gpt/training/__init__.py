"""What is learnt and how: objectives, schedule, settings, the one loop, validation, loggers."""
