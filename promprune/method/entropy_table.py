"""Spectral entropy from matrix products: the numbers, fitted once by scripts/figures/fit_entropy_polynomial.py.

Neither ONNX nor TensorRT has an eigensolver. For a symmetric matrix X whose spectrum lies in [0, 1] let

    V_0 = (a^2 / 4) X,    V_(k+1) = V_k (a I - V_k)        one n x n product each, k = 0 .. K-1
    x ln x  ~  linear * x + sum over (i, j) of c_ij v_i v_j

v_k being V_k of the number x. The trace of V_i V_j is a Frobenius inner product, so the sum of x ln x over all
eigenvalues, a polynomial of degree 2^(K+1), needs only the K products of the chain.

With C the centred covariance, p its eigenvalues over their sum, s = |C|_F / tr C, which is at least the largest p,
and X = C / |C|_F:  H = -(ln s + linear + s * sum c_ij <V_i, V_j>) / ln n. The error of the fit obeys
|error| <= delta (x + x0) on [0, 1] and is 0 at x = 0, so for any spectrum with n eigenvalues
|dH| <= delta (1 + n s x0) / ln n.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ENTROPY_TABLE", "EntropyTable"]


@dataclass(frozen=True)
class EntropyTable:
    """One fitted approximation of x ln x on [0, 1].

    Attributes:
        multiplier: a in V_(k+1) = V_k (a I - V_k).
        products: K, the number of those products.
        linear: coefficient of x.
        pairs: ``(i, j, c_ij)``, i <= j, for each inner product <V_i, V_j>.
        delta: largest |error| / (x + x0) on [0, 1].
        x0: offset of that weight.
    """

    multiplier: float
    products: int
    linear: float
    pairs: tuple[tuple[int, int, float], ...]
    delta: float
    x0: float


ENTROPY_TABLE = EntropyTable(
    multiplier=3.4,
    products=9,
    linear=-12.9535551,
    pairs=(
        (0, 0, 1.34200394),
        (0, 1, 0.0270959996),
        (0, 2, 0.00331844599),
        (0, 3, -0.000319045444),
        (0, 4, -0.000343887194),
        (0, 5, -6.96356656e-05),
        (0, 6, 0.000205038639),
        (0, 7, 0.000138781179),
        (0, 8, -0.000123618083),
        (0, 9, -0.000125119826),
        (1, 1, 0.340099245),
        (1, 2, 0.00609274674),
        (1, 3, 0.000810459547),
        (1, 4, 2.51466081e-05),
        (1, 5, 0.000164874),
        (1, 6, -7.36341899e-05),
        (1, 7, -0.000177500697),
        (1, 8, 6.43224994e-05),
        (1, 9, 0.000116215291),
        (2, 2, 0.0886073485),
        (2, 3, 0.0018591648),
        (2, 4, 0.000230996913),
        (2, 5, -0.000154397101),
        (2, 6, 4.4086577e-05),
        (2, 7, 0.000109722445),
        (2, 8, -3.43040665e-05),
        (2, 9, -5.99918276e-05),
        (3, 3, 0.0227806903),
        (3, 4, 0.00054790976),
        (3, 5, 0.000145313956),
        (3, 6, -3.0415913e-05),
        (3, 7, -5.62733912e-05),
        (3, 8, 1.22434103e-05),
        (3, 9, 2.47579865e-05),
        (4, 4, 0.00576891331),
        (4, 5, 0.000130076849),
        (4, 6, 3.28853494e-05),
        (4, 7, 2.03461022e-05),
        (4, 8, -5.72453882e-06),
        (4, 9, -9.64797073e-06),
        (5, 5, 0.00142980029),
        (5, 6, 3.86338506e-05),
        (5, 7, -1.32486889e-06),
        (5, 8, 2.4199885e-06),
        (5, 9, 4.15862951e-06),
        (6, 6, 0.000340484286),
        (6, 7, 1.74977031e-05),
        (6, 8, -1.49365405e-07),
        (6, 9, -4.21114555e-06),
        (7, 7, 6.93824695e-05),
        (7, 8, 7.95663254e-06),
        (7, 9, 5.65778191e-06),
        (8, 8, 1.58233306e-05),
        (8, 9, -2.48510196e-06),
        (9, 9, 3.58305374e-06),
    ),
    delta=0.0000221,
    x0=0.05,
)
