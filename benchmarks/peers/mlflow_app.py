"""MLflow: ``python -m benchmarks.peers.mlflow_app FOLDER`` saves the model that ``mlflow models serve`` then serves."""

import base64
import sys

import mlflow.pyfunc

from benchmarks.peers.model import answer, load_predictor


class Classifier(mlflow.pyfunc.PythonModel):
    """Takes ``{"inputs": {"image": [BASE64, ...]}}``."""

    def load_context(self, context):
        self.predictor = load_predictor()

    def predict(self, context, model_input, params=None):
        return answer(self.predictor, [base64.b64decode(text) for text in model_input["image"]])


if __name__ == "__main__":
    mlflow.pyfunc.save_model(sys.argv[1], python_model=Classifier(), pip_requirements=[])
