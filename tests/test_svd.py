"""The truncated SVD against LAPACK's full one, on the spectra that make it hard."""

import warnings

import pytest
import torch
from safetensors import SafetensorError

from tinylora.adapters import svd
from tinylora.adapters.factor_cache import cache_folder, cached_svd, digest


def gaussian(N, K):
    return torch.randn(N, K) * 0.02


def with_spectrum(N, K, values):
    n = min(N, K)
    left, right = (torch.linalg.qr(torch.randn(m, n, dtype=torch.float64)).Q for m in (N, K))
    return ((left * values.double()) @ right.T).float()


def decaying(N, K):
    n = min(N, K)
    return with_spectrum(N, K, 8 * torch.arange(1, n + 1) ** -0.6 + 0.5)


def angle(ours, exact) -> float:
    """The largest principal angle between two subspaces given by columns, in degrees, without arccos's floor."""
    ours, exact = (torch.linalg.qr(t.double()).Q for t in (ours, exact))
    outside = exact - ours @ (ours.T @ exact)
    return torch.rad2deg(torch.asin(torch.linalg.matrix_norm(outside, 2).clamp(max=1))).item()


@pytest.mark.parametrize("r", [1, 2, 8])
@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (700, 640), (600, 1100)], ids=str)
@pytest.mark.parametrize("spectrum", [gaussian, decaying])
def test_subspace_values_and_signs(spectrum, shape, r):
    W = spectrum(*shape)
    U, S, Vh = svd.truncated_svd(W, r)
    exact_U, exact_S, exact_Vh = torch.linalg.svd(W.double(), full_matrices=False)
    assert angle(U, exact_U[:, :r]) < 0.1 and angle(Vh.T, exact_Vh[:r].T) < 0.1
    torch.testing.assert_close(S.double(), exact_S[:r], rtol=1e-5, atol=0)
    torch.testing.assert_close(U.T @ U, torch.eye(r), rtol=0, atol=1e-4)
    # the product has no gauge: signs and pairing are right, too
    product = (exact_U[:, :r] * exact_S[:r]) @ exact_Vh[:r]
    assert torch.dist((U * S) @ Vh, product.float()) < 1e-3 * product.norm()
    assert (U.gather(0, U.abs().argmax(0, keepdim=True)) > 0).all()


def test_the_iteration_runs_where_it_should_and_is_used(monkeypatch):
    monkeypatch.setattr(svd, "_exact", lambda *_: pytest.fail("the exact fallback ran"))
    for W in (gaussian(700, 640), decaying(640, 700)):
        svd.truncated_svd(W, 2)


@pytest.mark.parametrize("r, tied", [(2, True), (3, False)])
def test_ties_fall_back_to_the_exact_answer_and_warn_only_where_they_matter(r, tied, monkeypatch):
    """Singular values 2 and 3 equal: the top 2 are not determined, the top 3 are."""
    values = torch.linspace(1, 0.1, 600)
    values[:4] = torch.tensor([3.0, 2.0, 2.0, 1.5])
    W = with_spectrum(640, 600, values)
    ran = []
    exact = svd._exact
    monkeypatch.setattr(svd, "_exact", lambda *a: ran.append(1) or exact(*a))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        U, S, Vh = svd.truncated_svd(W, r, "model.layers.3.mlp.up_proj")
    assert bool(ran) == tied
    assert (
        [str(w.message) for w in caught if "model.layers.3.mlp.up_proj" in str(w.message)] != [] if tied else not caught
    )
    torch.testing.assert_close(S, values[:r], rtol=1e-5, atol=0)
    torch.testing.assert_close((W @ Vh.T), U * S, rtol=0, atol=1e-4)


def test_low_rank_zero_and_bf16_weights():
    W = torch.randn(700, 3) @ torch.randn(3, 600)
    U, S, Vh = svd.truncated_svd(W, 3)
    torch.testing.assert_close((U * S) @ Vh, W, rtol=0, atol=1e-3)
    for N, K in ((20, 30), (700, 600)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            U, S, Vh = svd.truncated_svd(torch.zeros(N, K), 2)
        assert torch.equal(S, torch.zeros(2)) and U.isfinite().all() and Vh.isfinite().all()
    W = decaying(600, 700).bfloat16()
    assert angle(svd.truncated_svd(W, 2)[0], torch.linalg.svd(W.double())[0][:, :2]) < 0.1


def test_the_same_whatever_the_threads_the_matmul_precision_and_the_default_device():
    W = gaussian(640, 700)
    want = svd.truncated_svd(W, 2)
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    try:
        torch.set_num_threads(1)
        torch.set_float32_matmul_precision("medium")
        with torch.device("meta"):
            again = svd.truncated_svd(W, 2)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
    for a, b in zip(again, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="torch 2.9 and newer")
@pytest.mark.parametrize("of", [torch.backends, torch.backends.cuda.matmul], ids=["all", "cuda"])
def test_precision_set_by_the_newer_names(of):
    """transformers' tf32=True: torch's own question for the older setting is an error from then on."""
    ways = pytest.importorskip("tinylora.ops.ways")
    W, matmul = gaussian(640, 700), torch.backends.cuda.matmul
    want = svd.truncated_svd(W, 2)
    try:
        matmul.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "none"  # as before anybody set any
        svd.truncated_svd(W, 2)  # leaves nothing set, so that what is set later holds
        of.fp32_precision = "tf32"
        assert matmul.fp32_precision == "tf32"
        with pytest.raises(RuntimeError):
            torch.get_float32_matmul_precision()
        with svd._full_precision():
            assert matmul.fp32_precision == torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        again = svd.truncated_svd(W, 2)
        assert ways.precision() == "tf32x3" and matmul.fp32_precision == "tf32"
        of.fp32_precision = "ieee"
        assert ways.precision() == "ieee" and matmul.fp32_precision == "ieee"  # which follows, as before
    finally:
        of.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")
    for a, b in zip(again, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "weight, r, message",
    [
        (torch.ones(4, 4), 0, "r is 0, expected 1 to 4"),
        (torch.ones(4, 3), 4, "r is 4, expected 1 to 3: here is (4, 3)"),
        (torch.full((4, 4), float("nan")), 2, "here holds values that are not finite"),
        (torch.ones(4, 4, device="meta"), 2, "here is on the meta device"),
        (torch.ones(4), 1, "here is (4,) torch.float32, expected a floating matrix"),
    ],
)
def test_errors(weight, r, message):
    with pytest.raises(ValueError) as error:
        svd.truncated_svd(weight, r, "here")
    assert message in str(error.value)


def test_cache_finds_by_content_and_survives_damage(monkeypatch):
    W = gaussian(40, 30)
    want = cached_svd(W, 2, "w")
    (path,) = cache_folder().iterdir()
    with monkeypatch.context() as m:
        m.setattr("tinylora.adapters.factor_cache.truncated_svd", lambda *_: pytest.fail("not from the cache"))
        for a, b in zip(cached_svd(W.clone(), 2, "another name"), want, strict=True):
            assert torch.equal(a, b)
    assert len({digest(t) for t in (W, W.T.contiguous(), W.bfloat16(), W + 1e-7, W.T.contiguous().T)}) == 4
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", whole[:-8] + b"\x00\x00\x80\x7f" * 2):
        path.write_bytes(damaged)
        for a, b in zip(cached_svd(W, 2, "w"), want, strict=True):
            torch.testing.assert_close(a, b)
    assert [p.suffix for p in cache_folder().iterdir()] == [".safetensors"]


def test_a_full_disk_is_no_error(monkeypatch):
    def full(*_):
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr("tinylora.adapters.factor_cache.save_file", full)
    W = gaussian(40, 30)
    for a, b in zip(cached_svd(W, 2, "w"), svd.truncated_svd(W, 2), strict=True):
        assert torch.equal(a, b)
    assert list(cache_folder().iterdir()) == []
