"""Implementations of EM, and the choice between them."""
