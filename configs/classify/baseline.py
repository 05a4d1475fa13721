"""How well a classifier does beside the simplest that could be asked: counts of the same tokens, and always the same answer.

`python configs/classify/baseline.py RUN`, from the repository's root, with the folder of a run of `data.label_column`.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from tqdm import tqdm

from hybridlm import HybridLMForSequenceClassification
from hybridlm.checkpoint import load_tokenizer
from hybridlm.data.sources import Documents, Source, split_source
from hybridlm.output import quiet
from hybridlm.strict_yaml import load_yaml
from train.config import parse
from train.settings import Data
from train.setup import held_out

BATCH = 32  # documents in a pass of the model


def share(counts: np.ndarray) -> np.ndarray:
    return counts / np.maximum(counts.sum(1, keepdims=True), 1)


def root_share(counts: np.ndarray) -> np.ndarray:
    return np.sqrt(share(counts))


def unit_length(counts: np.ndarray) -> np.ndarray:
    return counts / np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1e-9)


SCALES, STRENGTHS = (share, root_share, unit_length, np.log1p), (1e-3, 1e-2, 1e-1, 1.0)


def splits(data: Data) -> list[tuple[list[str], np.ndarray]]:
    """Texts and labels of the training documents, and of those held out, as the run had them."""
    assert data.source is not None
    source = Source(data.source, data.revision, data.text_column, data.template, data.license, data.label_column)
    return [read(documents) for documents in split_source(source, held_out(data), data.val_fraction)]


def read(documents: Documents) -> tuple[list[str], np.ndarray]:
    assert documents.label is not None
    numbers = range(len(documents))
    return [documents[i] for i in numbers], np.array([documents.label(i) for i in numbers])


def counts(ids: list[list[int]], size: int) -> np.ndarray:
    """(documents tokens): how often each token comes in each document."""
    return np.stack([np.bincount(np.array(one, dtype=np.int64), minlength=size) for one in ids]).astype(float)


def bag_of_tokens(training: np.ndarray, labels: np.ndarray) -> GridSearchCV:
    """Logistic regression on (documents tokens) counts. How they are scaled and how much it is held back is chosen on parts of
    the training documents that the other parts were not trained on."""
    steps = [("scale", FunctionTransformer()), ("even", StandardScaler()), ("regression", LogisticRegression(max_iter=300))]
    return GridSearchCV(Pipeline(steps), {"scale__func": SCALES, "regression__C": STRENGTHS}, cv=3).fit(training, labels)


@torch.no_grad()
def answers(model: HybridLMForSequenceClassification, ids: list[list[int]]) -> np.ndarray:
    """What the model takes each document for."""
    said = []
    for i in tqdm(range(0, len(ids), BATCH), desc="model", unit="batch", leave=False, disable=None):
        part = [torch.tensor(one) for one in ids[i : i + BATCH]]
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(one) for one in part], batch_first=True)
        rows = torch.nn.utils.rnn.pad_sequence(part, batch_first=True)
        said += model(rows, mask).logits.argmax(-1).tolist()
    return np.array(model.config.label_names)[said]


def line(name: str, right: np.ndarray) -> str:
    """right: (documents) bool. The share with its standard error."""
    mean = right.mean()
    return f"{name:60} {mean:.3f} ± {np.sqrt(mean * (1 - mean) / len(right)):.3f}"


def compare(run: Path) -> list[str]:
    """
    Raises:
        ValueError: no run, or one of a language model.
    """
    data = parse(load_yaml(run / "config.yaml")).data
    if data.label_column is None:
        raise ValueError(f"{run} trains a language model; give a run of data.label_column.")
    (texts, labels), (asked_texts, asked) = splits(data)
    tokenizer = load_tokenizer(str(run / "model"))
    ids, asked_ids = (tokenizer(t, truncation=True).input_ids for t in (texts, asked_texts))  # its end at the end of each
    training, test = (counts([one[:-1] for one in each], len(tokenizer)) for each in (ids, asked_ids))
    names, sizes = np.unique(labels, return_counts=True)
    most = str(names[sizes.argmax()])
    bag = bag_of_tokens(training, labels)
    chosen = f"{bag.best_params_['scale__func'].__name__}, C {bag.best_params_['regression__C']:g}"
    model = HybridLMForSequenceClassification.from_pretrained(run / "model").eval()
    by_bag, by_model = bag.predict(test) == asked, answers(model, asked_ids) == asked
    gain = by_model.astype(float) - by_bag
    seen = tokenizer.model_max_length - 1
    return [
        f"{len(labels):,} documents to train on, {len(asked):,} held out, {len(names)} labels; the first {seen} tokens of each",
        line(f"always {most!r}", asked == most),
        line(f"bag of tokens, logistic regression ({chosen})", by_bag),
        line(f"{run}/model", by_model),
        f"{'the model above the bag, document by document':60} {gain.mean():.3f} ± {gain.std() / np.sqrt(len(gain)):.3f}",
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run (run_dir)")
    arguments = parser.parse_args()
    quiet()
    try:
        print(*compare(arguments.run), sep="\n")
    except ValueError as error:
        parser.error(str(error))
