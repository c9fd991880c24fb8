"""Spectral entropy from matrix products: the numbers, fitted once by scripts/fit_entropy_polynomial.py.

Neither ONNX nor TensorRT has an eigensolver. For a symmetric matrix whose spectrum x lies in [0, 1] let

    V_0 = scale * X,    V_(k+1) = V_k (a_k I - V_k)            one n x n product each
    x ln x  ~  constant + linear * x + sum over (i, j) of c_ij * V_i V_j

The trace of V_i V_j is a Frobenius inner product, so the sum over all eigenvalues of x ln x needs no further
products. The error obeys |error| <= delta * (x + x0) on [0, 1], hence for any spectrum a bound on the entropy.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ENTROPY_TABLE", "EntropyTable"]


@dataclass(frozen=True)
class EntropyTable:
    """One fitted approximation of x ln x on [0, 1].

    Attributes:
        scale: V_0 = scale * X.
        multipliers: a_k of each product V_(k+1) = V_k (a_k I - V_k).
        constant: coefficient of 1.
        linear: coefficient of x.
        pairs: ``(i, j, c_ij)`` for each inner product <V_i, V_j> that is used.
        delta: largest |error| / (x + x0) on [0, 1].
        x0: offset of the weight above.
    """

    scale: float
    multipliers: tuple[float, ...]
    constant: float
    linear: float
    pairs: tuple[tuple[int, int, float], ...]
    delta: float
    x0: float


ENTROPY_TABLE = EntropyTable(
    scale=2.89,
    multipliers=(3.4,) * 10,
    constant=-2.17588406e-07,
    linear=-13.8943306,
    delta=2.2e-05,
    x0=0.01,
    pairs=(
        (0, 0, 1.43766395),
        (0, 1, 0.0271140798),
        (0, 2, 0.00332404937),
        (0, 3, -0.000333691822),
        (0, 4, -0.000339634051),
        (0, 5, -2.76888234e-05),
        (0, 6, 0.000200874136),
        (0, 7, -7.7445709e-06),
        (0, 8, -0.000201040206),
        (0, 9, 4.22742281e-05),
        (0, 10, 0.000133248778),
        (1, 1, 0.368189839),
        (1, 2, 0.00609250025),
        (1, 3, 0.00105159307),
        (1, 4, 0.000128054988),
        (1, 5, -9.28256123e-05),
        (1, 6, -0.000161724644),
        (1, 7, 6.80899601e-05),
        (1, 8, 0.000172583696),
        (1, 9, -6.22831206e-05),
        (1, 10, -0.000120287535),
        (2, 2, 0.0969025759),
        (2, 3, 0.00170483338),
        (2, 4, 0.00018107739),
        (2, 5, 1.35757718e-05),
        (2, 6, 8.58198179e-05),
        (2, 7, -2.75113199e-05),
        (2, 8, -8.54936259e-05),
        (2, 9, 2.66153751e-05),
        (2, 10, 5.4976635e-05),
        (3, 3, 0.0252708213),
        (3, 4, 0.000547627627),
        (3, 5, 6.64951565e-05),
        (3, 6, -4.97549609e-05),
        (3, 7, 1.34573324e-05),
        (3, 8, 3.6621395e-05),
        (3, 9, -1.13026585e-05),
        (3, 10, -2.07987805e-05),
        (4, 4, 0.00647965382),
        (4, 5, 0.000159960719),
        (4, 6, 4.19490088e-05),
        (4, 7, -8.60804532e-06),
        (4, 8, -1.62464841e-05),
        (4, 9, 3.73876202e-06),
        (4, 10, 7.52186617e-06),
        (5, 5, 0.00163304338),
        (5, 6, 3.88062632e-05),
        (5, 7, 9.55743273e-06),
        (5, 8, 5.4882219e-06),
        (5, 9, -1.68350917e-06),
        (5, 10, -2.73695942e-06),
        (6, 6, 0.000401619717),
        (6, 7, 1.15616616e-05),
        (6, 8, -1.00701278e-07),
        (6, 9, 6.15293762e-07),
        (6, 10, 1.08954774e-06),
        (7, 7, 9.45179716e-05),
        (7, 8, 4.8598415e-06),
        (7, 9, 9.69451299e-08),
        (7, 10, -9.64613772e-07),
        (8, 8, 1.93613593e-05),
        (8, 9, 1.97170642e-06),
        (8, 10, 1.20966127e-06),
        (9, 9, 4.1289982e-06),
        (9, 10, -3.70152872e-07),
        (10, 10, 8.11230131e-07),
    ),
)
