"""The same model behind other servers, each as its own documentation shows it; see benchmarks/serving.py."""
