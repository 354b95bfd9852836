"""What is kept in files: saved estimators, checkpoints, models of other libraries."""
