"""The pipeline's threads."""

import os

# onnxruntime sends usage data to its makers unless it is told not to before it is loaded.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
