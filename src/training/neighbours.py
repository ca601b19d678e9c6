"""The training images nearest to a photo: ``python -m src.training.neighbours experiment=flowers --query IMAGE``.

Prints rows of train.npz, classes and cosine similarities, and draws plots/<experiment>/neighbours.png. The embeddings
of the training images are computed once for a model and kept in checkpoints/<experiment>/embeddings.npz.
"""

import logging
import sys
from pathlib import Path

import numpy as np
import torch

from src.config import config_parser, parse_config
from src.data.datamodule import load_data_info
from src.models import ImageClassifier, ModelError, load_model
from src.models.prototypes import PrototypeNetwork
from src.models.storage import weights_sha256
from src.preprocessing import ImageError, preprocess
from src.training.plots import plot_images
from src.training.predictions import load_images
from src.training.triplet_module import embed_images

logger = logging.getLogger(__name__)


def find_neighbours(config, model_path: str, query: Path, count: int) -> list[dict]:
    """The ``count`` training images most like ``query``, best first, and their picture as a file.

    Each has its ``row`` in train.npz, its ``class`` and its ``similarity``, the cosine of the embeddings.

    Raises ModelError, FileNotFoundError, ImageError, and ValueError for a model without embeddings or a bad count.
    """
    model, card = load_model(model_path)
    if not isinstance(model.network, PrototypeNetwork):
        raise ValueError(f"{model_path} is a {card.architecture}; only prototypes has embeddings (experiment=flowers)")
    images, labels = load_images(config, "train", model_path, card)
    if not 1 <= count <= len(images):
        raise ValueError(f"--count is {count}; it must lie between 1 and {len(images)}, the number of training images")
    if not query.is_file():
        raise FileNotFoundError(f"--query {query} does not exist; name an image file")
    image = preprocess(query.read_bytes(), card.preprocessing)
    wanted = embed_images(model, torch.tensor(image)[None]).numpy()[0]
    similarities = load_embeddings(config, model, images) @ wanted
    rows = np.argsort(-similarities, kind="stable")[:count]
    neighbours = [
        {"row": int(row), "class": card.class_names[labels[row]], "similarity": round(float(similarities[row]), 4)}
        for row in rows
    ]
    titles = ["query"] + [f"{item['class']}  {item['similarity']:.3f}" for item in neighbours]
    plot_images([image, *images[rows]], titles, Path(config.paths.plots) / "neighbours.png")
    return neighbours


def load_embeddings(config, model: ImageClassifier, images: np.ndarray) -> np.ndarray:
    """Embeddings float32 (N, embedding_size) of the training ``images``; read when they were kept for this model."""
    path = Path(config.paths.checkpoints) / "embeddings.npz"
    made_of = weights_sha256(model.state_dict()) + load_data_info(config.paths.metrics)["data_hash"]
    if path.is_file():
        with np.load(path) as kept:
            if str(kept["made_of"]) == made_of:
                return kept["embeddings"]
    logger.info("embedding %d training images -> %s", len(images), path)
    embeddings = embed_images(model, torch.from_numpy(images)).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}")  # half a file would be found by the next call
    np.savez(partial, embeddings=embeddings, made_of=made_of)
    partial.replace(path)
    return embeddings


def main(argv: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = config_parser(__doc__.splitlines()[0])
    parser.add_argument("--query", type=Path, required=True, help="an image file")
    parser.add_argument("--count", type=int, default=5, help="how many neighbours (default: 5)")
    parser.add_argument("--model-path", help="folder with config.json and weights (default: paths.best_model)")
    arguments, config = parse_config(parser, argv)
    try:
        path = arguments.model_path or config.paths.best_model
        neighbours = find_neighbours(config, path, arguments.query, arguments.count)
    except (ModelError, ImageError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for item in neighbours:
        print(f"row {item['row']:>6}  {item['class']:<16}  similarity {item['similarity']:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
