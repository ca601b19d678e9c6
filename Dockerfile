# ml-app:v1 classifies a folder of images into a CSV:
#   docker build -t ml-app:v1 .      then see ./docker-run-example.sh
ARG BASE_IMAGE=python:3.11.14-slim-bookworm

FROM ${BASE_IMAGE} AS build
# The index that has PyTorch without CUDA; empty takes torch from pip's default index.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY requirements.txt constraints.txt /pins/
COPY torchserve/requirements.txt /pins/serving.txt
# The server's versions hold here too; constraints.txt pins what they bring along, but names the training's torch.
RUN grep -v '^torch==' /pins/constraints.txt >/pins/others.txt \
    && python3 -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} \
        --constraint /pins/serving.txt --constraint /pins/others.txt \
        torch onnxruntime numpy pillow safetensors "$(grep '^tqdm==' /pins/requirements.txt)" \
    # C++ headers, torch's own tests and build tools: 195 MB that prediction never reads.
    && (cd /opt/venv/lib/python3*/site-packages/torch && rm -rf include test \
        && find bin -mindepth 1 ! -name torch_shm_manager -delete) \
    && /opt/venv/bin/pip uninstall --yes pip
WORKDIR /app
COPY src/__init__.py src/preprocessing.py src/image_limits.py src/plain_png.py src/styles.py src/image_files.py src/prediction_output.py src/predict.py src/
COPY src/models src/models
COPY src/inference src/inference
COPY models/best_model models/best_model
# Any user may run the image, whatever the modes are in the checkout.
RUN mkdir input output && chmod -R a+rX /app

FROM ${BASE_IMAGE}
COPY --from=build /opt/venv /opt/venv
COPY --from=build /app /app
RUN useradd --system --uid 10001 --no-create-home --shell /usr/sbin/nologin app && chown app /app/output
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /app
USER 10001
ENTRYPOINT ["python", "src/predict.py"]
CMD ["--input_path", "input", "--output_path", "output/predictions.csv"]
