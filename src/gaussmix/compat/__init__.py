"""What scripts for PyCave, Lightning and scikit-learn bring along."""
