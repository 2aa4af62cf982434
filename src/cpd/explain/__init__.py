"""Explain: what combing found, as a value that other programs read, and as a drawn graph."""

from __future__ import annotations

from .value import Edge, Explanation, Node, explain

__all__ = ["Edge", "Explanation", "Node", "explain"]
