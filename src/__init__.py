"""The shop's classifier. What ships imports this first, so what must be set before any library loads is set here."""

import os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # ONNX Runtime's Linux wheel reports to its maker unless told otherwise
