# Verbs of this repository; `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
export PATH := $(BIN):$(PATH)
# A local copy of the raw datasets is used when it lies beside the checkout.
DATA_MIRROR ?= $(abspath $(wildcard ../shared/data))
ifneq ($(DATA_MIRROR),)
export DATA_MIRROR
endif

.DEFAULT_GOAL := help
.PHONY: $(shell sed -nE 's/^([a-z-]+):.*##.*/\1/p' $(MAKEFILE_LIST))  # every verb of the list below

help:  ## list the verbs
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 18

env: $(VENV)/.requirements  ## make the environment from requirements.txt

$(VENV)/.requirements: requirements.txt constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -r requirements.txt
	touch $@

serving-env:  ## make torchserve/.venv, the environment of a server
	scripts/make_serving_environment.sh

data: env  ## download, verify and split the dataset
	python src/data/prepare.py --config configs/config.yaml

train: env  ## train the model of configs/config.yaml
	python src/training/train.py --config configs/config.yaml

evaluate: env  ## measure models/best_model on the test images
	python src/training/evaluate.py --config configs/config.yaml --model-path models/best_model

sweep: env  ## search learning rate, batch size, optimizer and dropout
	python src/training/sweep.py --config configs/config.yaml

predict: env  ## classify INPUT (a folder, an image or a file list) into OUTPUT (.csv or .json)
	python src/predict.py --input_path $(INPUT) --output_path $(OUTPUT)

onnx: env  ## make the ONNX files of models/best_model, FP32 and INT8
	python -m src.export.onnx --config configs/config.yaml --model-path models/best_model

BATCH ?= 32
PRECISION ?= fp16
tensorrt: env  ## make a TensorRT engine of models/best_model for BATCH images in PRECISION (needs an NVIDIA GPU)
	scripts/convert_to_tensorrt.sh models/best_model/model.onnx models/best_model/model.$(PRECISION).engine $(BATCH) $(PRECISION)

formats: env  ## compare the formats of models/best_model: size, speed, accuracy
	python -m src.export.compare --config configs/config.yaml --model-path models/best_model --test

mlflow-ui: env  ## look at the experiments
	mlflow ui

serve:  ## serve models/best_model with TorchServe
	./run_torchserve.sh

serve-fastapi: env  ## serve models/best_model with FastAPI on port 8000, its API at /docs
	python -m src.serving.fastapi_app --model-path models/best_model --runtime onnx-int8

stop:  ## stop the TorchServe server
	./run_torchserve.sh --stop

serve-mlflow: env  ## register models/best_model unless it is, and serve it with MLflow on port 5001
	uri=$$(python -m src.serving.mlflow_serving register) && \
	exec python -m src.serving.mlflow_serving serve --model-uri "$$uri"

bench: env  ## compare servers, sweep settings, scale and profile (40 minutes, on an idle machine; needs wrk)
	python benchmarks/serving.py
	python benchmarks/tune.py
	python benchmarks/scaling.py
	python benchmarks/stages.py

load-test: env  ## 100 requests/s to the running server for a minute, with a verdict
	python -m src.serving.load_test

test: env serving-env  ## run every test
	python -m pytest tests/ -v --numprocesses 2 --dist loadfile --durations 25

SOAK_REQUESTS ?= 1000000
FUZZ_REQUESTS ?= 20000
soak: env  ## mutated requests (FUZZ_REQUESTS), then good ones (SOAK_REQUESTS) with the memory watched
	FUZZ_REQUESTS=$(FUZZ_REQUESTS) python -m pytest tests/test_fuzz.py -v -s
	python benchmarks/soak.py --requests $(SOAK_REQUESTS)

test-containers:  ## build the three images and run two with buildah (no Docker engine needed)
	scripts/test_containers.sh

lint: env  ## check style, imports, shell scripts
	ruff check .
	ruff format --check .
	shellcheck --external-sources --check-sourced *.sh scripts/*.sh .ci/run
	shellcheck --external-sources torchserve/watch.sh

audit: env  ## look for known holes in the code and in the packages it installs
	python scripts/audit.py

sbom: env  ## write sbom.json, what a server is made of
	python scripts/write_sbom.py

format: env  ## rewrite the code in the one style
	ruff check --fix .
	ruff format .

pages: env  ## write docs/model_card.md from the metrics, docs/api.md from a running server's answers
	python src/training/model_card.py --config configs/config.yaml
	python scripts/write_api_docs.py

docs: env  ## build the pages of docs/ and the Python reference into docs/_build
	sphinx-build -W --keep-going -q docs docs/_build

clean:  ## stop the server, remove the environments and every archive, deployed ones too
	./run_torchserve.sh --stop
	rm -rf benchmarks/.venv docs/_build $(VENV) torchserve/.venv torchserve/.run torchserve/model.pt torchserve/model_config.json torchserve/*.onnx torchserve/model-store
