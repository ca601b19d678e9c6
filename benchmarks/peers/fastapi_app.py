"""FastAPI: ``uvicorn benchmarks.peers.fastapi_app:app --workers 2``. The raw body is the image."""

from fastapi import FastAPI, Request, Response

from benchmarks.peers.model import answer_bytes, load_predictor

app = FastAPI()
predictor = load_predictor()


@app.post("/predict")
async def predict(request: Request) -> Response:
    """Predicts in the event loop: handing a millisecond's work to a thread would cost more than it frees."""
    return Response(answer_bytes(predictor, await request.body()), media_type="application/json")
