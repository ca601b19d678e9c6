"""Training, evaluation and search: everything that needs labels."""
