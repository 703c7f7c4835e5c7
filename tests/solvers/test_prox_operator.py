"""The proximal operator against brute force, reference data, its properties and its other paths."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from itertools import combinations, permutations
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.runtime.threads import set_threads
from pipeline.solvers.kernels import prox_operator as prox
from pipeline.solvers.kernels.prox_operator import prox_operator
from pipeline.solvers.kernels.prox_torch import prox_torch
from tests.support.prox_cases import adversarial, allowance, excess, objective


def brute_force(z: Tensor, lam: Tensor, starts: int, sweeps: int) -> Tensor:
    """The lowest objective over all supports of at least two, by exact coordinate descent from
    several starts on each: knows nothing of signs, order or candidates beyond r itself.
    """
    generator = torch.Generator().manual_seed(0)
    z, lam = z.double(), lam.double()
    best = torch.full(z.shape[:-1], torch.inf, dtype=torch.float64)
    for size in (2, 3, 4):
        for support in combinations(range(4), size):
            mask = torch.zeros(4, dtype=torch.float64)
            mask[list(support)] = 1
            for start in range(1 if size == 2 else starts):
                share = torch.rand(z.shape, generator=generator, dtype=torch.float64)
                w = z * mask * (1 if start == 0 else share)
                for _ in range(1 if size == 2 else sweeps):
                    for i in support:
                        a, b, c = (w[:, j].abs() for j in range(4) if j != i)
                        threshold = lam * (a * b + b * c + c * a)
                        w[:, i] = (z[:, i].abs() - threshold).clamp(min=0) * z[:, i].sign()
                best = torch.minimum(best, objective(w, z, lam))
    return best


@pytest.fixture(params=["kernel", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways the operator runs on a CPU."""
    if request.param == "torch":
        monkeypatch.setattr(prox, "_numba_kernels", lambda: None)
    else:
        pytest.importorskip("numba")
    return str(request.param)


class TestMinimizer:
    def test_known_minimizers(self, path: str) -> None:
        golden = (math.sqrt(5) - 1) / 2
        z = torch.tensor([[1, 1, 1, 0], [0.32, -0.32, 0.32, 0.32], [3, -1, 2, 0.5]])
        expected = torch.tensor(
            [[golden, golden, golden, 0], [0.2, -0.2, 0.2, 0.2], [3, 0, 2, 0]],
            dtype=torch.float64,
        )
        torch.testing.assert_close(prox_operator(z.double(), 1.0), expected, rtol=0, atol=1e-7)
        torch.testing.assert_close(prox_operator(z, 1.0), expected.float(), rtol=0, atol=3e-6)

    def test_reference_data(self, path: str, shared: Path) -> None:
        data = load_file(str(shared / "golden" / "prox_operator_float64.safetensors"))
        y, lam, best = data["y"], data["lambda"], data["objective_star"]
        w = prox_operator(y, lam)
        assert (objective(w, y, lam) <= best + allowance(best, y)).all()

    def test_reference_data_in_float32(self, path: str, shared: Path) -> None:
        data = load_file(str(shared / "golden" / "prox_operator_float64.safetensors"))
        y, lam = data["y"].float(), data["lambda"].float()
        # What rounding the input did is not the operator's to answer for.
        best = objective(prox_operator(y.double(), lam.double()), y, lam)
        assert excess(prox_operator(y, lam), y, lam, best) <= 1

    def test_brute_force(self, path: str) -> None:
        z, lam = adversarial(1200)
        found = brute_force(z, lam, starts=3, sweeps=300)
        ours = objective(prox_operator(z, lam), z, lam)
        assert (ours <= found + allowance(found, z)).all()
        # The brute force means something only if it finds the minimum almost everywhere.
        assert (found <= ours * (1 + 1e-3) + allowance(ours, z)).double().mean() > 0.97

    @pytest.mark.slow
    @pytest.mark.timeout(1800)
    def test_brute_force_on_many(self) -> None:
        for seed in range(10):
            z, lam = adversarial(24_000, seed + 1)
            found = brute_force(z, lam, starts=3, sweeps=150)
            ours = objective(prox_operator(z, lam), z, lam)
            assert (ours <= found + allowance(found, z)).all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_newton_has_converged(
        self, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The steps allowed are enough: sixty in float64 find nothing better."""
        z, lam = adversarial(120_000, seed=5)
        z, lam = z.to(dtype), lam.to(dtype)
        w = prox_operator(z, lam)
        monkeypatch.setitem(prox.NEWTON_STEPS, torch.float64, 60)
        monkeypatch.setitem(prox.NEWTON_TOLERANCE, torch.float64, 0.0)
        best = objective(prox_operator(z.double(), lam.double()), z, lam)
        assert excess(w, z, lam, best) <= 1

    def test_the_quick_decision_is_safe(self) -> None:
        """Where the two largest are decided without Newton's method, nothing is better."""
        z, lam = adversarial(120_000, seed=6)
        u = (z.abs() * lam[:, None]).sort(dim=1, descending=True).values
        u1, u2, u3, _ = u.unbind(1)
        slack, area = 0.5 + 0.5 * (u1 - u2), 0.5 * (u1 + u2) * u2
        near = torch.where(area < slack, area >= u3, 4 * slack * area >= (slack + u3).square())
        decided = near | (u1 >= 2)
        two = 0.5 * u[:, 2:].square().sum(1)
        ones = torch.ones(len(u), dtype=torch.float64)
        # The plain torch path decides nothing in this way.
        exact = prox_torch(u, ones, 20, 0.0)
        best = objective(exact, u, ones)
        assert (two[decided] <= best[decided] * (1 + 1e-12)).all()
        assert 0.2 < decided.double().mean() < 0.8


class TestProperties:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_signs_and_order(self, path: str, dtype: torch.dtype) -> None:
        z, lam = adversarial(6000, seed=1)
        z, lam = z.to(dtype), lam.float()
        w = prox_operator(z, lam)
        assert (w * z >= 0).all()
        assert (w.abs() <= z.abs()).all()
        for i, j in permutations(range(4), 2):
            larger = z[:, i].abs() > z[:, j].abs()
            assert (w[larger, i].abs() >= w[larger, j].abs()).all()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_zero_lambda_is_the_identity(self, path: str, dtype: torch.dtype) -> None:
        z = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
        extremes = torch.tensor([1e-45, -0.0, 0.0, 1e-40, 3e38, -1e30, 1e-30, 1.0])
        z = torch.cat([z, extremes.repeat(64, 1)], dim=1).to(dtype)
        integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[z.element_size()]
        assert torch.equal(prox_operator(z, 0.0).view(integer), z.view(integer))

    @pytest.mark.parametrize("lam", [1e30, math.inf, 1e300])
    def test_large_lambda_keeps_the_two_largest(self, path: str, lam: float) -> None:
        z = torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
        kept = z.abs() >= z.abs().topk(2).values[:, 1:]
        assert torch.equal(prox_operator(z, lam), torch.where(kept, z, 0.0))

    def test_ties_keep_exactly_two(self, path: str) -> None:
        z = torch.tensor([[1, 1, 1, 1], [1, -1, 0.5, 1], [2, 1, 1, 1], [1, 1, 0, 0]])
        w = prox_operator(z, 1e6)
        assert ((w != 0).sum(1) == 2).all()
        assert torch.equal(w.abs().sum(1), torch.tensor([2.0, 2.0, 3.0, 2.0]))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_permutation(self, path: str, dtype: torch.dtype) -> None:
        z, lam = adversarial(3000, seed=2)
        z, lam = z.to(dtype), lam.to(dtype)
        distinct = (z.abs().sort(dim=1).values.diff(dim=1) > 0).all(1)
        z, lam = z[distinct], lam[distinct]
        w = prox_operator(z, lam)
        for order in permutations(range(4)):
            assert torch.equal(prox_operator(z[:, order], lam), w[:, order])

    @pytest.mark.parametrize("scale", [1e-6, 0.3, 7.0, 1e8])
    def test_scaling(self, path: str, scale: float) -> None:
        """prox_λ(c·z) = c·prox_{cλ}(z)."""
        z, lam = adversarial(3000, seed=3)
        one = prox_operator(scale * z, lam / scale)
        other = scale * prox_operator(z, lam)
        best = torch.minimum(
            objective(one, scale * z, lam / scale), objective(other, scale * z, lam / scale)
        )
        assert excess(one, scale * z, lam / scale, best) <= 1
        assert excess(other, scale * z, lam / scale, best) <= 1
        # Powers of two are exact, so the bytes are equal.
        assert torch.equal(prox_operator(4 * z, lam / 4), 4 * prox_operator(z, lam))

    @pytest.mark.parametrize("size", [1e30, 1e-30, 1e-38, 1e-42])
    def test_extreme_magnitudes(self, path: str, size: float) -> None:
        z = size * torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
        for lam in (0.0, 1e-30, 1e-3, 1.0, 1e30):
            w = prox_operator(z, lam)
            assert torch.isfinite(w).all()
            # The units of z that float64 can square.
            unit = z.double() / size
            scaled = torch.tensor(lam * size, dtype=torch.float64)
            best = objective(prox_operator(unit, lam * size), unit, scaled)
            rounding = 1e-6 if size >= 1e-38 else 1e-2
            ours = objective(w.double() / size, unit, scaled)
            assert (ours <= best * (1 + rounding) + rounding**2 * unit.square().sum(1)).all()

    def test_mixed_magnitudes(self, path: str) -> None:
        z = torch.tensor([[1e30, 1e-30, -1.0, 0.0], [1e-45, 1e30, 1e30, 1.0], [0, 0, 0, 1e30]])
        w = prox_operator(z, 1.0)
        expected = torch.tensor([[1e30, 0, -1.0, 0], [0, 1e30, 1e30, 0], [0, 0, 0, 1e30]])
        assert torch.equal(w, expected)

    def test_nan_stays_in_its_group(self, path: str) -> None:
        z = torch.tensor([[1, math.nan, 2, 3, 1, 2, 3, 4], [0, 0, 0, 0, 1, 1, 1, 1]])
        w = prox_operator(z, 0.1)
        assert w[0, :4].isnan().all()
        assert torch.equal(w[:, 4:], prox_operator(z[:, 4:], 0.1))
        assert torch.equal(w[1:], prox_operator(z[1:], 0.1))
        by_row = prox_operator(z, torch.tensor([0.1, math.nan]))
        assert torch.equal(by_row[0, 4:], w[0, 4:])
        assert by_row[1].isnan().all()
        assert prox_operator(torch.ones(8), math.nan).isnan().all()


class TestInterface:
    def test_lambda_per_row(self, path: str) -> None:
        z = torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(0))
        lam = torch.tensor([[0.0, 0.1, 0.3], [1.0, 3.0, 1e30]])
        w = prox_operator(z, lam)
        for i in range(2):
            for j in range(3):
                assert torch.equal(w[i, j], prox_operator(z[i, j], float(lam[i, j])))
        half = torch.tensor(0.5)
        assert torch.equal(prox_operator(z[0, 0], half), prox_operator(z[0, 0], 0.5))
        assert torch.equal(prox_operator(z, half.expand(2, 3)), prox_operator(z, 0.5))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_narrow_types_are_computed_in_float32(self, path: str, dtype: torch.dtype) -> None:
        z = torch.randn(700, 1024, generator=torch.Generator().manual_seed(0)).to(dtype)
        lam = torch.rand(700, generator=torch.Generator().manual_seed(1))
        w = prox_operator(z, lam)
        assert w.dtype == dtype
        assert torch.equal(w, prox_operator(z.float(), lam).to(dtype))

    def test_not_contiguous_and_not_modified(self, path: str) -> None:
        whole = torch.randn(40, 6, 64, generator=torch.Generator().manual_seed(0))
        for z in (whole.transpose(0, 1), whole[:, ::2], whole[..., 4:36], whole[..., ::4]):
            before = z.clone()
            lam = torch.rand(z.shape[:-1], generator=torch.Generator().manual_seed(1))
            assert torch.equal(prox_operator(z, lam), prox_operator(z.contiguous(), lam))
            assert torch.equal(z, before)

    @pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0,), (3, 0, 4)])
    def test_empty(self, path: str, shape: tuple[int, ...]) -> None:
        assert prox_operator(torch.empty(shape), 1.0).shape == shape

    def test_gradients_are_not_recorded(self, path: str) -> None:
        z = torch.ones(8, requires_grad=True)
        assert not prox_operator(z, 0.1).requires_grad

    def test_refuses(self) -> None:
        z = torch.ones(3, 8)
        with pytest.raises(ValueError, match="divisible by 4"):
            prox_operator(torch.ones(3, 6), 1.0)
        with pytest.raises(ValueError, match="divisible by 4"):
            prox_operator(torch.tensor(1.0), 1.0)
        with pytest.raises(ValueError, match="floating point"):
            prox_operator(torch.ones(3, 8, dtype=torch.int64), 1.0)
        with pytest.raises(ValueError, match=r"of shape \(3,\)"):
            prox_operator(z, torch.ones(4))
        with pytest.raises(ValueError, match="negative"):
            prox_operator(z, -1.0)
        with pytest.raises(ValueError, match="negative"):
            prox_operator(z, torch.tensor([0.0, -1e-9, 1.0]))


class TestSplitting:
    def test_rows_threads_and_neighbours_do_not_matter(self, path: str) -> None:
        """The same bytes however rows are split, and with any number of threads."""
        z = torch.randn(301, 2052, generator=torch.Generator().manual_seed(0))
        lam = torch.rand(301, generator=torch.Generator().manual_seed(1))
        whole = prox_operator(z, lam)
        for slices in (2, 3, 7):
            parts = zip(z.chunk(slices), lam.chunk(slices), strict=True)
            assert torch.equal(torch.cat([prox_operator(*part) for part in parts]), whole)
        half = z.bfloat16()
        try:
            set_threads(3)
            assert torch.equal(prox_operator(z, lam), whole)
            split = prox_operator(half, lam)
        finally:
            set_threads(1)
        assert torch.equal(prox_operator(half, lam), split)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_kernel_and_torch_agree(
        self, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pytest.importorskip("numba")
        z, lam = adversarial(60_000, seed=4)
        z, lam = z.to(dtype), lam.to(dtype)
        kernel = prox_operator(z, lam)
        monkeypatch.setattr(prox, "_numba_kernels", lambda: None)
        plain = prox_operator(z, lam)
        best = torch.minimum(objective(kernel, z, lam), objective(plain, z, lam))
        assert excess(kernel, z, lam, best) <= 1
        assert excess(plain, z, lam, best) <= 1

    @pytest.mark.slow
    def test_compiles_where_no_cache_can_be_written(self, repository: Path) -> None:
        pytest.importorskip("numba")
        program = (
            "import torch; from pipeline.solvers.kernels.prox_operator import prox_operator; "
            "print(prox_operator(torch.ones(4), 1e9).tolist())"
        )
        environment = os.environ | {
            "NUMBA_CACHE_DIR": "/dev/null/none",
            "NUMBA_CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator",
        }
        finished = subprocess.run(
            [sys.executable, "-c", program],
            cwd=repository,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert finished.stdout.strip() == "[1.0, 1.0, 0.0, 0.0]"


@pytest.mark.cuda
class TestOnGpu:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("kernels", ["triton", "torch"])
    def test_minimizer(self, dtype: torch.dtype, kernels: str) -> None:
        z, lam = adversarial(120_000, seed=7)
        z, lam = z.to(dtype), lam.to(dtype)
        best = objective(prox_operator(z.double(), lam.double()), z, lam)
        w = prox_operator(z.cuda(), lam.cuda(), kernels=kernels).cpu()
        assert excess(w, z, lam, best) <= 1

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
    def test_edges(self, dtype: torch.dtype) -> None:
        """Ties, zeros, denormals, infinities, NaN, and shapes that fill no block."""
        z = torch.tensor(
            [[1, 1, 1, 0], [1e30, -1e30, 5e29, -0.0], [1e-40, 2e-40, -0.0, 1e-44], [0, 0, 0, 0]]
        ).to(dtype)
        z = z.repeat(37, 3)
        on_gpu = z.cuda()
        assert torch.equal(prox_operator(on_gpu, 0.0).cpu(), z)
        for lam in (1e30, math.inf):
            w = prox_operator(on_gpu[::4], lam).cpu()
            assert ((w != 0).view(-1, 4).sum(1) == 2).all()
        torch.testing.assert_close(
            prox_operator(on_gpu, 1.0).cpu(), prox_operator(z, 1.0), rtol=1e-3, atol=1e-6
        )
        on_gpu[0, 1] = math.nan
        w = prox_operator(on_gpu, torch.rand(len(z), device="cuda"))
        assert w[0, :4].isnan().all()
        assert w.isnan().sum() == 4

    def test_signs_and_order(self) -> None:
        z, lam = adversarial(60_000, seed=8)
        z = z.float()
        w = prox_operator(z.cuda(), lam.cuda()).cpu()
        assert (w * z >= 0).all()
        for i, j in permutations(range(4), 2):
            larger = z[:, i].abs() > z[:, j].abs()
            assert (w[larger, i].abs() >= w[larger, j].abs()).all()

    def test_lambda_and_layout(self) -> None:
        whole = torch.randn(40, 6, 64, device="cuda")
        for z in (whole.transpose(0, 1), whole[:, ::2], whole[..., 4:36]):
            lam = torch.tensor(0.5, device="cuda").expand(z.shape[:-1])
            assert torch.equal(prox_operator(z, lam), prox_operator(z.contiguous(), 0.5))

    def test_rows_do_not_depend_on_their_neighbours(self) -> None:
        z = torch.randn(301, 2052, device="cuda")
        lam = torch.rand(301, device="cuda")
        parts = zip(z.chunk(7), lam.chunk(7), strict=True)
        assert torch.equal(
            torch.cat([prox_operator(*part) for part in parts]), prox_operator(z, lam)
        )

    def test_no_intermediate(self) -> None:
        z = torch.randn(4096, 4096, device="cuda")
        prox_operator(z, 0.3)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        prox_operator(z, 0.3)
        grown = torch.cuda.max_memory_allocated() - before
        assert grown <= z.numel() * z.element_size() + (1 << 20)
