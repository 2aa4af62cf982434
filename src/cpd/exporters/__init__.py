"""The shelf of exporters: each writes a network for another program, or for later.

onnx   one checked ONNX file
save   safetensors and plan; ``load`` reads it back
"""

from cpd.exporters.artefact import load, save
from cpd.exporters.onnx import onnx

__all__ = ["load", "onnx", "save"]
