"""Upcycling: a dense checkpoint becomes a mixture of experts that starts out from its MLP."""
