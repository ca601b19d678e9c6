"""A TorchServe handler as its examples have it: a BaseHandler, a tensor a request, the answer a dict, eager PyTorch."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from ts.torch_handler.base_handler import BaseHandler

from src.models import ModelConfig, build_classifier


class StockHandler(BaseHandler):
    """Answers the bytes of one image; loaded from the same archive as this project's own handler."""

    def initialize(self, context):
        folder = Path(context.system_properties["model_dir"])
        self.config = ModelConfig.load(folder / "model_config.json")
        self.device = torch.device("cpu")
        self.model = build_classifier(self.config)
        self.model.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
        self.model.eval()
        self.initialized = True

    def preprocess(self, data):
        images = []
        for row in data:
            spec = self.config.preprocessing
            image = Image.open(io.BytesIO(row.get("data") or row.get("body")))
            image = image.convert("L" if spec.channels == 1 else "RGB")
            pixels = np.atleast_3d(np.asarray(image.resize((spec.width, spec.height))))
            images.append(torch.from_numpy(pixels.transpose(2, 0, 1).copy()))
        return torch.stack(images)

    def inference(self, data, *args, **kwargs):
        with torch.inference_mode():
            return self.model(data.to(self.device))

    def postprocess(self, data):
        names, answers = self.config.class_names, []
        for row in torch.softmax(data, 1).tolist():
            best = max(range(len(row)), key=row.__getitem__)
            answers.append(
                {
                    "predicted_class": best,
                    "predicted_label": names[best],
                    "confidence": row[best],
                    "probabilities": dict(zip(names, row, strict=True)),
                }
            )
        return answers
