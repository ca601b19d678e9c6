"""What the FastAPI server takes and answers, for its page at /docs."""

from pydantic import BaseModel, Field

from src.serving.fastapi_service import MAX_BATCH

JSON = "application/json"


class Answer(BaseModel):
    """What one image is taken for."""

    predicted_class: int = Field(description="index of the class", examples=[1])
    predicted_label: str = Field(description="its name", examples=["Trouser"])
    confidence: float | None = Field(description="its probability; null for NaN", examples=[0.9948])
    uncertain: bool = Field(description="the confidence is low: let a person look")
    probabilities: dict[str, float | None] = Field(description="by class, summing to 1", examples=[{"Trouser": 0.9948}])
    model_version: str = Field(description="which version answered", examples=["1.0"])


class Error(BaseModel):
    """Why a request was not answered."""

    code: int = Field(description="the HTTP status", examples=[400])
    type: str = Field(description="a short stable name", examples=["not_an_image"])
    message: str = Field(description="what is wrong and what to do")


class Health(BaseModel):
    """``ready`` (200) or ``stopping`` (503). The port opens when the model is loaded and warm, not before."""

    status: str = Field(examples=["ready"])
    model: str = Field(examples=["fashion_mnist"])
    model_version: str = Field(examples=["1.0"])
    classes: int = Field(description="how many the model knows", examples=[10])
    runtime: str = Field(examples=["onnx-int8"])
    device: str = Field(examples=["cpu"])
    requests: int = Field(description="being classified or waiting, in the worker that answers", examples=[0])


class About(BaseModel):
    """What this server is."""

    name: str = Field(examples=["fashion_mnist"])
    version: str = Field(description="of the model", examples=["1.0"])
    description: str
    endpoints: dict[str, str]


IMAGE = {"type": "string", "format": "binary", "description": "the bytes of an image file"}
BASE64 = {"type": "string", "description": "base64 of an image file; a data URI is taken too"}
ERRORS = {
    400: {"model": Error, "description": "the input cannot be answered"},
    413: {"model": Error, "description": "the body is too large"},
    503: {"model": Error, "description": "too many requests wait (see Retry-After), or large images take long"},
}


def request_body(json_schema: dict, form: dict, **others: dict) -> dict:
    """The part of the OpenAPI page that describes what may be sent."""
    content = {JSON: {"schema": {"type": "object", "properties": json_schema}}}
    content["multipart/form-data"] = {"schema": {"type": "object", "properties": form}}
    return {"requestBody": {"required": True, "content": content | others}}


ONE = request_body({"image": BASE64}, {"data": IMAGE}, **{"application/octet-stream": {"schema": IMAGE}})
SEVERAL = request_body(
    {"images": {"type": "array", "items": BASE64, "minItems": 1, "maxItems": MAX_BATCH}},
    {"files": {"type": "array", "items": IMAGE}},
)
