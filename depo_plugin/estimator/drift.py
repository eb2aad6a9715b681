"""How the policy's ability moves with the text: kinds of prompts become easier at their own pace.

    ability of prompt i = θ(t) + v(t)·φ_i

φ_i: the text's unit embedding. v: a random walk, followed by a Kalman filter from what changed since a prompt's last
visit. What a prompt's belief said then is subtracted, so the filter's choice of prompts does not bias v. The walk's
variance is one of a few candidates; each has a Kalman filter of its own, and they are weighed by how likely they made
the groups that came.

Suffixes: B = prompts of one call, F = features, K = candidates.
"""

import numpy as np

from depo_plugin.estimator.item_response import shares

WALKS_K = np.array([0.001, 0.01, 0.1])  # candidates for the walk's variance per update, of each weight
KEPT = 0.98  # share of the candidates' log-likelihood kept per update


class TextDrift:
    """The walk of the text's weights."""

    def __init__(self, features: int):
        """Start at zero. features: columns of the embeddings, 0 if there are none."""
        self._mean_KF = np.zeros((len(WALKS_K), features))
        self._covariance_KFF = np.zeros((len(WALKS_K), features, features))
        self._log_K = np.zeros(len(WALKS_K))

    def shifts(self, text_BF: np.ndarray) -> np.ndarray:
        """Return v·φ by each candidate, (K, B)."""
        return self._mean_KF @ text_BF.T

    def shift(self, text_BF: np.ndarray) -> np.ndarray:
        """Return v·φ, (B,): the candidates' mean, weighed by their likelihood."""
        return text_BF @ (shares(self._log_K) @ self._mean_KF)

    def variance(self, text_BF: np.ndarray) -> np.ndarray:
        """Return the variance of v·φ by the likeliest candidate, (B,)."""
        return np.einsum("bf,bf->b", text_BF @ self._covariance_KFF[self._log_K.argmax()], text_BF)

    def walk(self) -> None:
        """Let one update pass."""
        features = np.arange(self._mean_KF.shape[1])
        self._covariance_KFF[:, features, features] += WALKS_K[:, None]

    def learn(self, text_BF: np.ndarray, change_B: np.ndarray, noise_B: np.ndarray, log_K: np.ndarray) -> None:
        """Learn from revisited prompts (B >= 1).

        change_B: what was found of v·φ; noise_B: its variance; log_K: log-likelihood of these prompts' groups by each
        candidate before this update.
        """
        self._log_K = KEPT * self._log_K + log_K
        for mean_F, covariance_FF in zip(self._mean_KF, self._covariance_KFF, strict=True):
            shared_BF = text_BF @ covariance_FF
            gain_BF = np.linalg.solve(shared_BF @ text_BF.T + np.diag(noise_B), shared_BF)
            mean_F += (change_B - text_BF @ mean_F) @ gain_BF
            covariance_FF -= shared_BF.T @ gain_BF

    def state_dict(self) -> dict:
        """Return copies of all arrays."""
        return {"mean": self._mean_KF.copy(), "covariance": self._covariance_KFF.copy(), "log": self._log_K.copy()}

    def load_state_dict(self, state: dict) -> None:
        """Restore a state_dict(). Raise ValueError if fields or shapes differ."""
        mine = self.state_dict()
        if set(state) != set(mine) or any(np.shape(state[name]) != mine[name].shape for name in mine):
            raise ValueError("text drift: fields or shapes differ. It was written by another version or setting.")
        self._mean_KF, self._covariance_KFF, self._log_K = (np.array(state[name]) for name in mine)
