"""A FastAPI server over src.inference.Predictor, with the same JSON as TorchServe's:
``python -m src.serving.fastapi_app --model-path models/best_model --runtime onnx-int8 --port 8000``."""

import argparse
import os
import socket
import sys

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp

from src.inference import Predictor
from src.inference.requests import MAX_IMAGES
from src.inference.runtimes import FILES
from src.models import ModelError
from src.serving.fastapi_metrics import CONTENT_TYPE
from src.serving.fastapi_requests import Refusal, RequestLog, read_body
from src.serving.fastapi_schema import ERRORS, JSON, ONE, SEVERAL, About, Answer, Health
from src.serving.fastapi_service import MAX_BATCH, Service
from src.serving.fastapi_workers import UNUSABLE, DrainingServer, end_on_signals, listen_on, supervise

SWITCH = 0.0002  # seconds that a classifying thread may keep the event loop waiting; Python's 0.005 costs a fifth

# TorchServe's own words for the same.
HTTP_ERRORS = {
    404: ("ResourceNotFoundException", "Requested resource is not found, please refer to API document."),
    405: ("MethodNotAllowedException", "Requested method is not allowed, please refer to API document."),
}


def build_app(service: Service) -> ASGIApp:
    """The server's ASGI application."""
    name = service.predictor.config.name
    app = FastAPI(title=f"{name}: image classification", version=service.version, redoc_url=None)
    add_errors(app)
    add_reports(app, service)

    async def predict(request: Request, limit: int, as_list: bool) -> Response:
        service.check_room()
        body = await read_body(request)
        kind = request.headers.get("content-type", "")
        status, content, request.state.images = await service.answer(body, kind, limit, as_list)
        return Response(content, status, media_type=JSON)

    @app.put("/predict", include_in_schema=False)  # what curl -T sends
    @app.post("/predict", response_model=Answer | list[Answer], responses=ERRORS, openapi_extra=ONE)
    async def predict_one(request: Request):
        """Classify the image of a form field of any name, of JSON `{"image": base64}`, or of a raw body. Several
        fields or JSON `{"images": [...]}` answer a list, in the same order."""
        return await predict(request, MAX_IMAGES, as_list=False)

    @app.post("/predict/batch", response_model=list[Answer], responses=ERRORS, openapi_extra=SEVERAL)
    async def predict_batch(request: Request):
        """Classify up to 10 images: form fields, which may share a name, or JSON `{"images": [...]}`. Answers a list in
        the same order, or the error of the first image that cannot be read."""
        return await predict(request, MAX_BATCH, as_list=True)

    return RequestLog(app, service.metrics, lambda: service.closing)


def add_reports(app: FastAPI, service: Service) -> None:
    """What tells of the server itself."""
    config = service.predictor.config
    about = About(
        name=config.name,
        version=service.version,
        description=f"Classifies images into {len(config.class_names)} classes: {', '.join(config.class_names)}",
        endpoints={
            "GET /health": "whether the server is ready",
            "POST /predict": "classify an image, or several",
            "POST /predict/batch": f"classify up to {MAX_BATCH} images",
            "GET /metrics": "for Prometheus",
            "GET /docs": "this API, to try out",
        },
    )

    @app.get("/")
    async def what_this_is() -> About:
        return about

    @app.get("/health", responses={503: {"model": Health, "description": "the server is stopping"}})
    async def health(response: Response) -> Health:
        response.status_code = 503 if service.stopping else 200
        return Health(
            status="stopping" if service.stopping else "ready",
            model=config.name,
            model_version=service.version,
            classes=len(config.class_names),
            runtime=service.runtime,
            device=service.predictor.device,
            requests=service.taken,
        )

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    def metrics() -> Response:
        return Response(service.metrics.show(), media_type=CONTENT_TYPE)


def add_errors(app: FastAPI) -> None:
    """Every error has the three keys of TorchServe's."""

    def reply(status: int, kind: str, message: str, headers: dict | None = None) -> Response:
        return JSONResponse({"code": status, "type": kind, "message": message}, status, headers)

    @app.exception_handler(Refusal)
    async def refused(_: Request, error: Refusal) -> Response:
        return reply(error.status, error.kind, str(error), error.headers)

    @app.exception_handler(HTTPException)
    async def of_http(_: Request, error: HTTPException) -> Response:
        kind, message = HTTP_ERRORS.get(error.status_code, ("HttpException", error.detail))
        return reply(error.status_code, kind, message, error.headers)

    @app.exception_handler(ClientDisconnect)
    async def hung_up(_: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # for the log, as nginx writes it; nobody reads this answer

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> Response:
        return reply(500, "InternalServerException", "the server failed; its log says why, under the X-Request-ID")


def work(arguments: argparse.Namespace, listener: socket.socket) -> None:
    """Serve in this process until a signal ends it; exits with UNUSABLE when the model cannot be served."""
    end_on_signals()
    sys.setswitchinterval(SWITCH)
    try:
        if arguments.runtime == "torch":
            import torch

            torch.set_num_threads(1)  # of each call: more threads, not more of them in each, use more cores
        predictor = Predictor.load(arguments.model_path, runtime=arguments.runtime)
    except (ModelError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(UNUSABLE)
    service = Service(predictor, arguments.runtime, arguments.model_version, arguments.threads, arguments.queue)
    DrainingServer(build_app(service), service).run([listener])


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-path", default="models/best_model", help="folder with config.json; %(default)s")
    parser.add_argument("--runtime", default="onnx-int8", choices=FILES, help="what runs the network; %(default)s")
    parser.add_argument("--model-version", default="1.0", help="the model_version of every answer; %(default)s")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; %(default)s")
    parser.add_argument("--port", type=int, default=8000, help="%(default)s")
    parser.add_argument("--workers", type=int, default=1, help="processes; %(default)s")
    parser.add_argument("--threads", type=int, help="requests classified at a time by each; processors / workers")
    parser.add_argument("--queue", type=int, default=100, help="requests that wait in each before a 503; %(default)s")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if arguments.threads is None:
        arguments.threads = max(1, (os.cpu_count() or 1) // max(1, arguments.workers))
    for name, least in (("workers", 1), ("threads", 1), ("queue", 0)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name} is {getattr(arguments, name)}; it must be at least {least}")
    if not 0 <= arguments.port <= 65535:
        parser.error(f"--port is {arguments.port}; it must be at most 65535, or 0 for any that is free")
    try:
        listener = listen_on(arguments.host, arguments.port)
    except OSError as error:
        parser.error(f"--host {arguments.host} --port {arguments.port}: {error.strerror}; choose another")
    if arguments.workers > 1:
        return supervise(work, arguments, listener, arguments.workers)
    work(arguments, listener)
    return 0


if __name__ == "__main__":
    sys.exit(main())
