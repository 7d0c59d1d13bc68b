"""The top of a weight's singular value decomposition: where TinyLoRA and LoRA-XS get their frozen factors.

W ≈ U diag(S) Vh. Only r of thousands of triplets are wanted, so a full decomposition (PEFT's way: 6 seconds
for 3584 x 3584 on two CPU cores) does a thousand times too much. `torch.svd_lowrank` does too little: on a
gaussian matrix, which is what an untrained model consists of, its subspace is off by 84 degrees.
"""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# A side this short is decomposed exactly: eigh in fp64 takes less than 0.1 s.
EXACT_SIDE = 512
BLOCK = 16  # narrower blocks take as many passes over W, and MKL runs them two to nine times slower
MAX_STEPS = 96
# Largest angle between the computed and the true subspace that is good enough (0.1 degree), in radians.
MAX_ANGLE = 1.7e-3
# Residual of the Gram matrix's eigenpairs, relative to the largest eigenvalue, at which fp32 has no more to give.
RESIDUAL_FLOOR = 5e-7


def truncated_svd(weight: Tensor, r: int, name: str = "weight") -> tuple[Tensor, Tensor, Tensor]:
    """The r largest singular triplets of W, (U [N, r], S [r], Vh [r, K]) in fp32, on W's device.

    Block Krylov iteration on WᵀW with full reorthogonalisation (Musco and Musco, arXiv 1504.05477, algorithm 2),
    stopped by its residual; wherever the residual does not prove an angle below 0.1 degree to the true subspace,
    eigenvectors of the Gram matrix in fp64 instead. Signs are fixed: the entry of largest magnitude in each
    column of U is positive. The start is the same for every matrix of a shape, so the result is too.

    A warning names the module when singular values r and r+1 are so close that the subspace is not determined
    by W beyond rounding. ValueError: r below 1 or above min(N, K), a weight that is not a matrix of finite
    floats, or one without data (on the meta device).
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"{name} is {tuple(weight.shape)} {weight.dtype}, expected a floating matrix (N, K)")
    if weight.is_meta:
        raise ValueError(f"{name} is on the meta device and has no data: load the weights first")
    if not 1 <= r <= min(weight.shape):
        raise ValueError(f"r is {r}, expected 1 to {min(weight.shape)}: {name} is {tuple(weight.shape)} (N, K)")
    W = weight.detach().float()
    if not torch.isfinite(W).all():
        raise ValueError(f"{name} holds values that are not finite: it has no singular value decomposition")
    wide = W.shape[0] < W.shape[1]
    A = W.T if wide else W  # tall: the Gram matrix AᵀA has the short side
    with _full_precision():
        found = None if A.shape[1] <= EXACT_SIDE else _krylov(A, r)
        V, eigenvalues = found or _exact(A, r)
        _warn_of_ties(eigenvalues, r, A, name)
        left = A @ V
        S = torch.linalg.vector_norm(left, dim=0)
        left = left / S.clamp(min=torch.finfo(S.dtype).tiny)
    U, V = (V, left) if wide else (left, V)
    signs = U.gather(0, U.abs().argmax(0, keepdim=True)).sign()
    signs[signs == 0] = 1
    return (U * signs).contiguous(), S, (V * signs).T.contiguous()


def _exact(A: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """The r leading eigenvectors of AᵀA [n, r] and all that follow's eigenvalues, descending, through fp64."""
    eigenvalues, V = torch.linalg.eigh(_gram(A))
    return V[:, -r:].flip(-1).to(A.dtype), eigenvalues.flip(-1)


def _gram(A: Tensor) -> Tensor:
    """AᵀA in fp64, by blocks of rows: an fp64 copy of a 7B model's largest layer would take half a gigabyte."""
    total = torch.zeros(A.shape[1], A.shape[1], dtype=torch.float64, device=A.device)
    for rows in A.split(4096):
        wide = rows.double()
        total.addmm_(wide.T, wide)
    return total


def _krylov(A: Tensor, r: int) -> tuple[Tensor, Tensor] | None:
    """As `_exact`, or None where the iteration cannot show that its subspace is the right one."""
    m, n = A.shape
    block = max(BLOCK, r + 4)
    most = min(MAX_STEPS, n // block)
    Q = A.new_empty(n, most * block)  # an orthonormal basis
    AQ = A.new_empty(m, most * block)
    AAQ = A.new_empty(n, most * block)  # AᵀA Q: the residual needs no further pass over A
    start = torch.Generator().manual_seed(n)
    q = torch.linalg.qr(torch.randn(n, block, generator=start, dtype=torch.float32, device="cpu").to(A)).Q
    previous = float("inf")
    for step in range(most):
        new, upto = slice(step * block, (step + 1) * block), (step + 1) * block
        Q[:, new] = q
        torch.mm(A, q, out=AQ[:, new])
        torch.mm(A.T, AQ[:, new], out=AAQ[:, new])
        if step % 6 == 5 or step == most - 1:
            T = AQ[:, :upto].T @ AQ[:, :upto]
            eigenvalues, C = torch.linalg.eigh(T.double())
            eigenvalues, C = eigenvalues.flip(-1), C[:, -r:].flip(-1).to(A.dtype)
            V = Q[:, :upto] @ C
            largest = eigenvalues[0].item()
            if largest <= 0:
                return None
            residual = torch.linalg.matrix_norm(AAQ[:, :upto] @ C - V * eigenvalues[:r].to(A.dtype)).item()
            residual /= largest
            gap = (eigenvalues[r - 1] - eigenvalues[r]).item() / largest
            proven = residual <= MAX_ANGLE * gap  # Davis and Kahan's sin θ
            if proven and (residual <= RESIDUAL_FLOOR or residual > 0.5 * previous):
                return torch.linalg.qr(V).Q, eigenvalues
            previous = residual
        q = AAQ[:, new]
        for _ in range(2):  # twice is enough (Kahan)
            q = q - Q[:, :upto] @ (Q[:, :upto].T @ q)
            q = torch.linalg.qr(q).Q
    return None


def _warn_of_ties(eigenvalues: Tensor, r: int, A: Tensor, name: str) -> None:
    if r >= A.shape[1] or r >= eigenvalues.numel():
        return
    top, last, following = (eigenvalues[i].clamp(min=0).sqrt().item() for i in (0, r - 1, r))
    # Rounding moves singular values by about eps * S_1; 0.1 degree needs a gap hundreds of times that.
    if last - following <= 1e-4 * top:
        warnings.warn(
            f"{name}: singular values {r} and {r + 1} nearly tie ({last:.6g} and {following:.6g}), so the top-{r} "
            "subspace is not determined by the weights beyond rounding; save this adapter with factors=True",
            stacklevel=3,
        )


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """fp32 matmuls in fp32: TF32 or bf16 passes, which training scripts switch on, would stall the iteration."""
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # set by torch 2.9's newer names (torch.backends.fp32_precision), which are not to be mixed
        before = None
    with contextlib.ExitStack() as restored:
        if hasattr(torch.backends, "fp32_precision"):
            # The older call sets these, too: they would not follow torch.backends.fp32_precision any more.
            restored.enter_context(_ieee(torch.backends.cuda.matmul))
            restored.enter_context(_ieee(torch.backends.mkldnn.matmul))
        if before is not None:
            restored.callback(torch.set_float32_matmul_precision, before)
            torch.set_float32_matmul_precision("highest")
        yield


@contextlib.contextmanager
def _ieee(of: Any) -> Iterator[None]:
    """The same for one backend's matmuls."""
    before, of.fp32_precision = of.fp32_precision, "none"
    inherited = of.fp32_precision == before  # from the setting of all backends, as it goes on to be
    of.fp32_precision = "ieee"
    try:
        yield
    finally:
        of.fp32_precision = "none" if inherited else before
