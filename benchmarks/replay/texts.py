"""The prompts' texts, their embeddings, and the predictions of a linear model from them.

Suffixes: N = prompts of a pool, E = the encoder's width, L = layers, 2 = all layers and those in use, B = those told.
"""

import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np

from depo_plugin.estimator.embed import pad, tokenize
from depo_plugin.settings.config import EstimatorConfig

# Families of short reasoning-gym questions. A family's levels are those of its curriculum, all attributes together.
FAMILIES = (
    "chain_sum",
    "gcd",
    "base_conversion",
    "letter_counting",
    "spell_backward",
    "leg_counting",
    "simple_equations",
    "fraction_simplification",
    "time_intervals",
    "count_bits",
    "products",
    "lcm",
    "prime_factorization",
    "calendar_arithmetic",
    "syllogism",
    "family_relationships",
    "basic_arithmetic",
    "caesar_cipher",
)
LEVELS = 5  # most levels of a family; some curricula have fewer
HELD_BACK = ("rotation",)  # attributes that stay at their first level, because the family refuses its later levels
DRAWN_PER_WANTED = 8  # questions drawn per wanted question, because short ones repeat
FOLDS = 5
RIDGE = (10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10000.0)  # penalties tried, on standardised columns
CHUNK = 24  # texts per forward pass
THREADS = 2


def default_cache() -> Path:
    """Return the folder that keeps texts and embeddings between runs."""
    return Path(tempfile.gettempdir()) / f"depo-replay-{os.getuid() if hasattr(os, 'getuid') else 'cache'}"


# ── Texts ──


def _levels(family: str) -> list:
    """Return the different configurations of a family's levels. All attributes rise together."""
    from reasoning_gym.factory import CURRICULA

    found = []
    for level in range(LEVELS):
        curriculum = CURRICULA[family]()
        for name, attribute in curriculum.attributes.items():
            curriculum.set_attr_level(name, 0 if name in HELD_BACK else min(level, len(attribute.levels) - 1))
        config = vars(curriculum.generate_configuration({"seed": 0, "size": 1}))
        if config not in found:
            found.append(config)
    return found


def _questions(family: str, config: dict, seed: int, count: int) -> list[str]:
    """Return up to `count` different questions of one family at one level of its curriculum."""
    from reasoning_gym.factory import create_dataset

    # An entry's seed is the data set's seed plus its position. If seeds were close, two levels would share questions.
    size = count * DRAWN_PER_WANTED
    dataset = create_dataset(family, **config | {"seed": seed * 10**6, "size": size})
    found: dict[str, None] = {}
    for i in range(size):
        found[dataset[i]["question"]] = None
        if len(found) == count:
            break
    return list(found)


def gym_texts(size: int, cache: Path, families=FAMILIES) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Return `size` different questions, family_N and level_N (0 to 1) of each. They are the same in every run.

    Families and levels are equally frequent, if each family has enough different questions.
    """
    spec = [families, LEVELS, size, HELD_BACK, DRAWN_PER_WANTED, version("reasoning-gym")]
    path = cache / f"texts-{_digest([json.dumps(spec)])}.json"
    if path.exists():
        rows = json.loads(path.read_text(encoding="utf-8"))
    else:
        rows = _draw_texts(size, families)
        _write(path, lambda file: file.write(json.dumps(rows).encode()))
    texts, family_N, level_N = zip(*rows, strict=True)
    return list(texts), np.array(family_N), np.array(level_N)


def _draw_texts(size: int, families: tuple[str, ...]) -> list[tuple[str, int, float]]:
    levels = {name: _levels(name) for name in families}
    wanted = -(-size // sum(map(len, levels.values())))
    while True:
        seen: set[str] = set()
        rows = []
        for family, configs in enumerate(levels.values()):
            for level, config in enumerate(configs):
                found = _questions(families[family], config, 1 + family * LEVELS + level, wanted)
                new = [text for text in found if text not in seen]
                seen.update(new)
                rows += [(text, family, level / (len(configs) - 1)) for text in new]
        if len(rows) >= size:
            order = np.random.default_rng(size).permutation(len(rows))[:size]
            return [rows[i] for i in order.tolist()]
        wanted += wanted // 8 + 1


# ── Embeddings ──


def estimator_cache(cache: Path) -> Path:
    """Return the folder in which the estimators of all runs keep their embeddings."""
    return cache / "estimator"


def embed(texts: list[str], cache: Path) -> np.ndarray:
    """Return mean-pooled embeddings by the frozen bundled encoder, float32 (2, N, E), from the cache if it has them.

    The first entry uses all layers, as a user would; the second uses the layers that the recommended estimator uses.
    """
    path = _embeddings_path(texts, cache)
    if not path.exists():
        rows_2NE = _encode(texts, cache).astype(np.float16)
        _write(path, lambda file: np.save(file, rows_2NE))
    return np.load(path).astype(np.float32)


def _encode(texts: list[str], cache: Path) -> np.ndarray:
    """Return embeddings as embed() does, and put them into the estimator's cache: each text is encoded only once."""
    from depo_plugin.estimator.embedding_cache import EmbeddingCache
    from depo_plugin.estimator.encoder import load_encoder, token_limit, weights_digest
    from depo_plugin.messages import prompt_key

    cfg = EstimatorConfig()
    used, tokenizer = load_encoder(None, cfg.depth)
    rows_2NE = layer_means(texts, (-1, used.config.num_hidden_layers))
    limit = token_limit(used, tokenizer, cfg.max_length)
    store = EmbeddingCache(estimator_cache(cache) / f"{weights_digest(used)}-{limit}-fp32", used.config.hidden_size)
    store.get(np.array([prompt_key(text, "") for text in texts], np.uint64), lambda missing: rows_2NE[1, missing])
    return rows_2NE


def layer_means(texts: list[str], layers: Sequence[int] | None = None) -> np.ndarray:
    """Return the bundled encoder's mean-pooled hidden states after these layers, float32 (layers, N, E).

    layers: 0 is the encoder's input, -1 its last layer; None means all, in order.
    """
    import torch

    from depo_plugin.estimator.encoder import load_encoder, masked_mean, token_limit

    encoder, tokenizer = load_encoder(None)
    encoder.eval()
    layers = range(encoder.config.num_hidden_layers + 1) if layers is None else layers
    rows_LNE = np.empty((len(layers), len(texts), encoder.config.hidden_size), np.float32)
    ids = tokenize(tokenizer, texts, token_limit(encoder, tokenizer, EstimatorConfig().max_length))
    order = np.argsort([len(one) for one in ids], kind="stable")  # similar lengths together, for little padding
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        with torch.inference_mode():
            for batch in (order[i : i + CHUNK] for i in range(0, len(order), CHUNK)):
                tokens, mask = pad([ids[i] for i in batch], tokenizer.pad_token_id, torch.device("cpu"))
                states = encoder(input_ids=tokens, attention_mask=mask, output_hidden_states=True).hidden_states
                for rows_NE, layer in zip(rows_LNE, layers, strict=True):
                    rows_NE[batch] = masked_mean(states[layer], mask).numpy()
    finally:
        torch.set_num_threads(before)
    return rows_LNE


# ── Ridge regression on embeddings ──


def ridge_predictions(x_BE: np.ndarray, y_B: np.ndarray, x_NE: np.ndarray, penalties) -> list[np.ndarray]:
    """Return one prediction at x_NE, float64 (N,), per penalty: of a ridge regression that learned y_B at x_BE."""
    mean = y_B.mean()
    gram, moment, eye = x_BE.T @ x_BE, x_BE.T @ (y_B - mean), np.eye(x_BE.shape[1])
    return [mean + x_NE @ np.linalg.solve(gram + penalty * eye, moment) for penalty in penalties]


class Ridge:
    """Out-of-fold ridge predictions from fixed embeddings. Folds and solvers are made once, for many targets."""

    def __init__(self, x_NE: np.ndarray):
        """Standardise the columns, split into FOLDS, and prepare one solver per fold."""
        x_NE = np.asarray(x_NE, np.float64)
        x_NE = (x_NE - x_NE.mean(0)) / (x_NE.std(0) + 1e-9)
        fold_N = np.random.default_rng(len(x_NE)).permutation(len(x_NE)) % FOLDS
        self._folds = []
        for fold in range(FOLDS):
            inside, outside = np.flatnonzero(fold_N != fold), np.flatnonzero(fold_N == fold)
            values, vectors = np.linalg.eigh(x_NE[inside].T @ x_NE[inside])
            self._folds.append((inside, outside, x_NE[inside] @ vectors, x_NE[outside] @ vectors, values.clip(0)))

    def predict(self, y_N: np.ndarray, penalty: float) -> np.ndarray:
        """Return each prompt's prediction, learned from the folds that do not contain it."""
        out_N = np.empty(len(y_N))
        for inside, outside, x_in, x_out, values in self._folds:
            mean = y_N[inside].mean()
            weights = (x_in.T @ (y_N[inside] - mean)) / (values + penalty)
            out_N[outside] = mean + x_out @ weights
        return out_N

    def best(self, y_N: np.ndarray) -> np.ndarray:
        """Return the out-of-fold predictions of the penalty with the least squared error."""
        found = [self.predict(y_N, penalty) for penalty in RIDGE]
        return min(found, key=lambda out_N: float(np.square(out_N - y_N).sum()))


@functools.lru_cache(maxsize=2)
def _ridge(path: Path) -> Ridge:
    return Ridge(np.load(path)[0])


def ridge_of(texts: list[str], cache: Path) -> Ridge:
    """Return the prepared regression on these texts' embeddings. It is made once per process."""
    embed(texts, cache)
    return _ridge(_embeddings_path(texts, cache))


def _embeddings_path(texts: list[str], cache: Path) -> Path:
    return cache / f"embeddings-{_digest([*texts, str(EstimatorConfig().depth)])}.npy"


def _digest(texts: list[str]) -> str:
    digest = hashlib.blake2b(digest_size=12)
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def _write(path: Path, write) -> None:
    """Write a cache file under a temporary name, then rename it, because two processes may write the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        write(file)
    temporary.replace(path)
