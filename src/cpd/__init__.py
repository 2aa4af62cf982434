"""CPD: Comb, Prune, Distill. Make a trained PyTorch network smaller, and prove it."""

__version__ = "0.1.0"

__all__ = ["__version__"]
