"""The measures of the house, and every exception to them by name, with why."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "cpd"

LINES_OF_FILE = 400
LINES_OF_FUNCTION = 50  # docstring not counted
NESTING = 3
PARAMETERS = 7

# "file:function:measure" -> why. An exception that is no longer needed fails the test.
EXCEPTIONS: dict[str, str] = {
    "choose.py:choose:parameters": "public entry: one keyword for each decision of a plan",
    "distill/__init__.py:distill:parameters": "public entry: one keyword for each part of a run",
    "losses/cirkd.py:CIRKD.__init__:parameters": "each parameter is an option of the recipe",
    "losses/af_dcd.py:AfDCD.__init__:parameters": "each parameter is an option of the recipe",
    "data/scenes.py:scenes:parameters": "each parameter is an option of the recipe",
    "cli/commands.py:Shell.comb:parameters": "each parameter is a flag of the command",
    "cli/commands.py:Shell.export:parameters": "each parameter is a flag of the command",
    "cli/commands.py:Shell.prune:parameters": "each parameter is a flag of the command",
    "cli/commands.py:Shell.sensitivity:parameters": "each parameter is a flag of the command",
    "attention.py:CutMultiheadAttention.forward:parameters": "called as nn.MultiheadAttention is",
}

# May name architectures, parameters and libraries of models.
KNOWS_MODELS = ("models", "data", "cli", "adapters", "_torchvision.py", "_mend.py")

# Long words are refused anywhere in an identifier, short ones as a whole part of one.
LONG_WORDS = (
    "resnet",
    "resnext",
    "mobilenet",
    "densenet",
    "efficientnet",
    "convnext",
    "segformer",
    "seaformer",
    "torchvision",
    "mmpretrain",
    "mmsegmentation",
)
SHORT_WORDS = (
    "vit",
    "deit",
    "swin",
    "bert",
    "gpt",
    "llama",
    "timm",
    "transformers",
    "vgg",
    "alexnet",
    "inception",
)

# Not part of the core: imported where they are used, or absent.
EXTRAS = (
    "accelerate",
    "jsonargparse",
    "lightning",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "rich",
    "scipy",
    "sklearn",
    "timm",
    "torch_pruning",
    "torchmetrics",
    "torchvision",
    "transformers",
    "yaml",
)

# Modules that may need an extra to be imported at all -> why.
NEEDS_EXTRAS: dict[str, str] = {
    "cpd.tasks._confusion": "a subclass of torchmetrics.Metric; imported in Segmentation.metrics",
    "cpd.adapters.lightning": "a subclass of Lightning's Callback; imported by its users alone",
    "cpd.adapters.transformers": "subclasses of its Trainer and callback; imported by users alone",
    "cpd.tasks._topk": "a subclass of torchmetrics.Metric; imported inside Classification.metrics",
}

SHELVES = (
    "rules",
    "importance",
    "costs",
    "losses",
    "tasks",
    "data",
    "models",
    "exporters",
    "adapters",
)

# Modules of a shelf that its other members may import, beside those that start with an underscore.
SHARED_IN_SHELF = ("base",)

# The closed public surface: everything `import cpd` may offer. Adding to it is a decision.
PUBLIC = {
    "ArtefactError",
    "CPDError",
    "CouplingGroup",
    "DataError",
    "Event",
    "ExportError",
    "Groups",
    "InputError",
    "Interrupted",
    "MissingGradient",
    "NonFiniteLoss",
    "OutOfMemory",
    "OutputError",
    "Plan",
    "PlanMismatch",
    "Proof",
    "Pruner",
    "Report",
    "Result",
    "TraceError",
    "UnknownName",
    "UnreachableTarget",
    "VerifyError",
    "choose",
    "comb",
    "compress",
    "costs",
    "cut",
    "distill",
    "explain",
    "importance",
    "load",
    "mask",
    "prune",
    "repair",
    "save",
    "steps",
    "verify",
}
