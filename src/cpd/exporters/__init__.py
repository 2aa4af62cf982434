"""The shelf of exporters: each writes a network for another program, or for later.

onnx      one checked ONNX file
int8      an ONNX file quantized after training; ``Running`` runs it, to measure it
pt2       an archive of torch.export, checked
openvino  OpenVINO's two files, checked
hub       artefacts pushed to and pulled from the hub of Hugging Face
save      safetensors and plan; ``load`` reads it back
"""

from cpd.exporters import hub
from cpd.exporters.artefact import load, save
from cpd.exporters.int8 import Running, int8
from cpd.exporters.onnx import onnx
from cpd.exporters.openvino import openvino
from cpd.exporters.pt2 import pt2

__all__ = ["Running", "hub", "int8", "load", "onnx", "openvino", "pt2", "save"]
