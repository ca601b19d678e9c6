"""Datasets: fetched, verified, split, loaded and augmented."""
