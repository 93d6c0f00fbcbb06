"""The loss-level methods in float64 and in the papers' notation: slow, plain, their judge.

One class a method, one equation a line, on numpy arrays; nothing is shared with
`fastmto.balancers`. Every class is a state machine over T tasks: `weights(L, S)` gives the weights
of a step that sees the losses L (n,) of the tasks S (n indices, increasing) and moves the state.
What stands in the papers for all tasks is read over S.

    L (n)   losses      w (n)   weights      T   number of tasks      S   present tasks

Sources are with the classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Tasks = Sequence[int]


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max())
    normalized: Array = e / e.sum()
    return normalized


class Adam:
    """Kingma & Ba 2015, Algorithm 1, on T numbers of which some move; weight decay by gradient."""

    def __init__(self, T: int, lr: float, decay: float = 0.0) -> None:
        self.lr, self.decay = lr, decay
        self.m, self.v, self.t = np.zeros(T), np.zeros(T), np.zeros(T)

    def step(self, x: Array, g: Array, S: Tasks) -> None:
        """Move x[S] (in place) along the gradient g (n,)."""
        for i, g_i in zip(S, g, strict=True):
            g_i = g_i + self.decay * x[i]
            self.t[i] += 1
            self.m[i] = 0.9 * self.m[i] + 0.1 * g_i
            self.v[i] = 0.999 * self.v[i] + 0.001 * g_i**2
            m_hat = self.m[i] / (1 - 0.9 ** self.t[i])
            v_hat = self.v[i] / (1 - 0.999 ** self.t[i])
            x[i] -= self.lr * m_hat / (np.sqrt(v_hat) + 1e-8)


class SI:
    """Navon et al., ICML 2022: minimise sum_i log L_i."""

    def weights(self, L: Array, S: Tasks) -> Array:
        w: Array = 1 / L
        return w


class RLW:
    """Lin et al., TMLR 2022, with weights that average 1; z (T,) is what was drawn."""

    def weights(self, z: Array, S: Tasks) -> Array:
        w: Array = len(S) * softmax(z[list(S)])
        return w


class DWA:
    """Liu et al., CVPR 2019, equation 7; an epoch is `window` steps, or ends by `end_epoch`."""

    def __init__(self, T: int, temp: float, window: int | None) -> None:
        self.temp, self.window = temp, window
        self.running: list[list[float]] = [[] for _ in range(T)]  # losses of this epoch
        self.means: list[list[float]] = [[] for _ in range(T)]  # L_i(0), L_i(1), ...
        self.steps = 0

    def weights(self, L: Array, S: Tasks) -> Array:
        r = [self.means[i][-1] / self.means[i][-2] if len(self.means[i]) > 1 else 1.0 for i in S]
        w: Array = len(S) * softmax(np.array(r) / self.temp)
        for i, L_i in zip(S, L, strict=True):
            self.running[i].append(L_i)
        self.steps += 1
        if self.steps == self.window:
            self.end_epoch()
        return w

    def end_epoch(self) -> None:
        for losses, means in zip(self.running, self.means, strict=True):
            if losses:
                means.append(float(np.mean(losses)))
                losses.clear()
        self.steps = 0


class Uncertainty:
    """Kendall et al., CVPR 2018, equation 7: J = sum_i (exp(-s_i) L_i + s_i) / 2.

    s moves by plain gradient descent, as far as `weights` is told.
    """

    def __init__(self, T: int, s: float = 0.0) -> None:
        self.s = np.full(T, s)

    def weights(self, L: Array, S: Tasks) -> Array:
        w: Array = np.exp(-self.s[list(S)]) / 2
        return w

    def gradient(self, L: Array, S: Tasks) -> Array:
        """dJ/ds (n,)."""
        g: Array = (-np.exp(-self.s[list(S)]) * L + 1) / 2
        return g


class IMTLL:
    """Liu et al., ICLR 2021, section 3.2: J = sum_i (exp(s_i) L_i - s_i)."""

    def __init__(self, T: int, s: float = 0.0) -> None:
        self.s = np.full(T, s)

    def weights(self, L: Array, S: Tasks) -> Array:
        w: Array = np.exp(self.s[list(S)])
        return w

    def gradient(self, L: Array, S: Tasks) -> Array:
        """dJ/ds (n,)."""
        g: Array = np.exp(self.s[list(S)]) * L - 1
        return g


class BanditMTL:
    """Mao et al., ACL 2021: mirror ascent on p in {sum_i p_i log(T p_i) <= rho}.

    lambda comes from bisection, as in the paper's Algorithm 2.
    """

    def __init__(self, T: int, eta: float, rho: float) -> None:
        self.eta, self.rho = eta, rho
        self.p = np.full(T, 1 / T)

    def weights(self, L: Array, S: Tasks) -> Array:
        S = list(S)
        mass = self.p[S].sum()
        p: Array = self.p[S] / mass
        log_q = np.log(p) + self.eta * L

        def projected(lam: float) -> Array:
            return softmax(log_q / (1 + lam))

        def excess(lam: float) -> float:
            p = projected(lam)
            return float((p * np.log(len(S) * p)).sum() - self.rho)

        lam = 0.0
        if excess(0.0) > 0:
            low, high = 0.0, 1.0
            while excess(high) > 0:
                low, high = high, 2 * high
            for _ in range(200):
                lam = (low + high) / 2
                low, high = (lam, high) if excess(lam) > 0 else (low, lam)
        self.p[S] = mass * projected(lam)
        return p


class GradNorm:
    """Chen et al., ICML 2018, Algorithm 1, with weights kept above `least`."""

    def __init__(self, T: int, alpha: float, lr: float, least: float) -> None:
        self.alpha, self.least = alpha, least
        self.w = np.ones(T)
        self.L0 = np.full(T, np.nan)
        self.adam = Adam(T, lr)

    def weights(self, L: Array, S: Tasks, g: Sequence[Array]) -> Array:
        """g: the gradients of the L_i on the last shared layer."""
        S = list(S)
        first = np.isnan(self.L0[S])
        self.L0[S] = np.where(first, L, self.L0[S])
        w: Array = self.w[S].copy()
        length = np.array([np.linalg.norm(g_i) for g_i in g])
        G = w * length
        L_tilde = L / self.L0[S]
        r = L_tilde / L_tilde.mean()
        target = G.mean() * r**self.alpha
        self.adam.step(self.w, np.sign(G - target) * length, S)
        self.w[S] = np.maximum(self.w[S], self.least)
        self.w[S] *= w.sum() / self.w[S].sum()
        return w


class FAMO:
    """Liu et al., NeurIPS 2023, Algorithm 1, with Adam as in the released code."""

    def __init__(self, T: int, lr: float, gamma: float, minima: Array) -> None:
        self.xi = np.zeros(T)
        self.minima = minima
        self.adam = Adam(T, lr, gamma)
        self.before = np.zeros(T)

    def weights(self, L: Array, S: Tasks) -> Array:
        S = list(S)
        l = L - self.minima[S]  # noqa: E741
        z = softmax(self.xi[S])
        c = 1 / (z / l).sum()
        self.before[S] = l
        w: Array = c * z / l
        return w

    def update(self, L: Array, S: Tasks) -> None:
        S = list(S)
        z = softmax(self.xi[S])
        jacobian = np.diag(z) - np.outer(z, z)
        delta = np.log(self.before[S]) - np.log(L - self.minima[S])
        self.adam.step(self.xi, jacobian.T @ delta, S)


class LDCMTL:
    """Xiao et al., arXiv 2502.08585, Algorithm 2: one descent on J = g + penalty f.

    W moves by plain gradient descent, as far as it is told.
    """

    def __init__(self, T: int, penalty: float, sigma: str, tau: str, normalization: str) -> None:
        self.penalty, self.sigma, self.tau, self.normalization = penalty, sigma, tau, normalization
        self.W = np.ones(T)
        self.L0 = np.full(T, np.inf)

    def weights(self, L: Array, S: Tasks) -> Array:
        """dJ/dL (n,), by the chain rule; `gradient` keeps dJ/dW."""
        S = list(S)
        n = len(S)
        self.L0[S] = np.where(np.isinf(self.L0[S]), L, self.L0[S])
        if self.normalization == "log":
            l, dl = np.log(L / self.L0[S]), 1 / L  # noqa: E741
        elif self.normalization == "rescaled":
            ratios = self.L0[S] / self.L0.min()
            l, dl = L / ratios, 1 / ratios  # noqa: E741
        else:
            l, dl = L, np.ones(n)  # noqa: E741
        if self.sigma == "softmax":
            sigma = softmax(self.W[S])
            jacobian = np.diag(sigma) - np.outer(sigma, sigma)
            total = 1.0
        else:
            sigma = 1 / (1 + np.exp(-self.W[S]))
            jacobian = np.diag(sigma * (1 - sigma))
            total = sigma.sum()  # held constant
        dJ_dl, dJ_dsigma = sigma / total, l / total
        for i in range(n - 1):
            if self.tau == "sigma":
                s = self.penalty * np.sign(sigma[i] * l[i] - sigma[i + 1] * l[i + 1])
                dJ_dl[i] += s * sigma[i]
                dJ_dl[i + 1] -= s * sigma[i + 1]
                dJ_dsigma[i] += s * l[i]
                dJ_dsigma[i + 1] -= s * l[i + 1]
            else:
                s = self.penalty * np.sign(l[i] - l[i + 1])
                dJ_dl[i] += s
                dJ_dl[i + 1] -= s
        self.dJ_dW: Array = jacobian.T @ dJ_dsigma
        w: Array = dJ_dl * dl
        return w

    def gradient(self, L: Array, S: Tasks) -> Array:
        """dJ/dW (n,) of the last `weights`."""
        return self.dJ_dW
