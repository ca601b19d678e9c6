"""Clients of a running server, and other servers over the same Predictor."""
