"""appendix/recover.py: the chain with an oracle, the modes, pages that hold the images given."""

import argparse
import math

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image

import diffusion
import runs
import train
from appendix import recover
from appendix.chart import FACTOR


class Oracle:
    """A model whose v is the clean image itself, and whose DiT reads the noise off it."""

    def __init__(self):
        self.seen = []
        self.abar = diffusion.alphas_cumprod()

    def encoder(self, x0, t):
        self.seen.append(int(t[0]))
        return x0.flatten(1)

    def dit(self, x_t, t, v):
        a = self.abar[t].to(x_t).view(-1, 1, 1, 1)
        return (x_t - a.sqrt() * v.view_as(x_t)) / (1 - a).sqrt()


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_an_oracle_recovers_the_image_from_noise_and_from_its_code(steps):
    x0 = torch.rand(3, 1, 4, 4, dtype=torch.float64) * 2 - 1
    model = Oracle()
    v = recover.trajectory(model, x0, diffusion.ddim_times(steps))
    assert model.seen == diffusion.ddim_times(steps)  # once for each step used
    noise = torch.randn(x0.shape, dtype=torch.float64)
    for eta in (0.0, 1.0):
        assert torch.allclose(recover.from_noise(model, v, noise, steps, eta, 0), x0, atol=1e-9)
    code = recover.encode_code(model, v, x0, steps)
    assert torch.allclose(recover.from_code(model, v, code, steps), x0, atol=1e-9)


def test_only_decoding_from_noise_clips_and_eta_adds_noise():
    x0 = torch.rand(2, 1, 4, 4, dtype=torch.float64) * 4 - 2  # beyond [-1, 1]
    v = recover.trajectory(Oracle(), x0, diffusion.ddim_times(7))
    noise = torch.randn(x0.shape, dtype=torch.float64)
    code = recover.encode_code(Oracle(), v, x0, 7)
    assert torch.allclose(recover.from_code(Oracle(), v, code, 7), x0, atol=1e-9)
    assert recover.from_noise(Oracle(), v, noise, 7, 0.0, 0).abs().max() <= 1

    class Still(Oracle):
        """Sees no noise, so that what is added stays in the picture."""

        def dit(self, x_t, t, v):
            return torch.zeros_like(x_t)

    small = 1e-3 * noise
    a, b, c, d = (
        recover.from_noise(Still(), v, small, 7, eta, seed)
        for eta, seed in ((0.0, 0), (1.0, 0), (1.0, 0), (1.0, 1))
    )
    assert torch.equal(b, c) and not torch.allclose(a, b) and not torch.allclose(b, d)


@pytest.fixture
def pages(monkeypatch):
    """The rows that a mode would draw."""
    drawn = []
    monkeypatch.setattr(
        recover, "table_page", lambda rows, heads, path: drawn.append((rows, heads))
    )
    return drawn


def flags(**change):
    return argparse.Namespace(**{"steps": 7, "eta": 0.0, "seed": 0, **change})


def test_swap_puts_codes_in_rows_and_v_in_columns(pages, tmp_path):
    x0 = torch.rand(3, 1, 4, 4, dtype=torch.float64) * 2 - 1
    recover.swap(Oracle(), x0, flags(), tmp_path)
    rows, heads = pages[0]
    assert len(rows) == len(heads) == 4 and torch.equal(rows[0][1][1:], x0)
    for i in range(3):  # the oracle's v is the image itself: column j shows image j in each row
        assert torch.equal(rows[i + 1][1][0], x0[i])
        assert torch.allclose(rows[i + 1][1][1:], x0, atol=1e-9)


def test_interpolation_goes_from_the_first_image_to_the_second(pages, tmp_path):
    x0 = torch.rand(4, 1, 4, 4, dtype=torch.float64) * 2 - 1
    recover.interpolate(Oracle(), x0, flags(), tmp_path)
    rows, heads = pages[0]
    assert len(rows) == 2 and len(heads) == 9
    for row, (a, b) in zip(rows, ((x0[0], x0[1]), (x0[2], x0[3]))):
        assert torch.equal(row[1][0], a) and torch.equal(row[1][-1], b)
        for k in range(7):
            assert torch.allclose(row[1][1 + k], torch.lerp(a, b, k / 6), atol=1e-9)


def test_one_step_estimates_use_the_v_that_the_row_names(pages, tmp_path):
    x0 = torch.rand(3, 1, 4, 4, dtype=torch.float64) * 2 - 1
    mean = {t: torch.full((1, 16), 0.25, dtype=torch.float64) for t in recover.TIMES}
    recover.timesteps(Oracle(), x0, flags(), tmp_path, mean)
    rows = pages[0][0]
    assert [name for name, _ in rows[:5]] == ["x_t", "right v", "another's v", "mean v", "zero v"]
    want = {"right v": x0[1], "another's v": x0[0], "mean v": 0.25 + 0 * x0[1], "zero v": 0 * x0[1]}
    for name, images in rows[5:10]:  # of the second image
        if name in want:
            assert torch.allclose(images, want[name].expand_as(images), atol=1e-9), name
    assert not torch.allclose(rows[5][1][0], rows[5][1][10])  # x_t at t = 0 and 999


def test_slerp_keeps_the_length_and_meets_both_ends():
    a, b = torch.randn(2, 5, 1, 8, 8, dtype=torch.float64)
    assert torch.allclose(recover.slerp(a, b, 0.0), a) and torch.allclose(
        recover.slerp(a, b, 1.0), b
    )
    a, b = (x / x.flatten(1).norm(dim=1).view(-1, 1, 1, 1) for x in (a, b))
    middle = recover.slerp(a, b, 0.3).flatten(1)
    assert torch.allclose(middle.norm(dim=1), torch.ones(5, dtype=torch.float64))
    angle = (a.flatten(1) * b.flatten(1)).sum(1).acos()
    assert torch.allclose((middle * a.flatten(1)).sum(1).acos(), 0.3 * angle)
    assert torch.equal(recover.slerp(a, a, 0.5), a)


def test_score_against_numpy():
    x0 = torch.rand(4, 3, 5, 5) * 2 - 1
    x = x0 + 0.3 * torch.randn(x0.shape)
    a, b = ((y.clamp(-1, 1).numpy() + 1) / 2 for y in (x, x0))
    errors = ((a - b) ** 2).reshape(4, -1).mean(1)
    mse, psnr = recover.score(x, x0)
    assert mse == pytest.approx(errors.mean(), rel=1e-5)
    assert psnr == pytest.approx(np.mean(10 * np.log10(1 / errors)), rel=1e-5)


def test_a_page_holds_the_images_given(tmp_path):
    images = torch.rand(3, 1, 32, 32) * 2 - 1
    recover.page([("left", images, 2)], [("right", -images, 2)], tmp_path / "page.png")
    page = np.asarray(Image.open(tmp_path / "page.png")).astype(int)
    scale, side = recover.scale_of(32), 32 * recover.scale_of(32) + recover.GAP
    for k in range(3):
        x, y = 20 + k % 2 * side, 12 + recover.HEAD + k // 2 * side
        got = page[y : y + 32 * scale : scale, x : x + 32 * scale : scale, 0]
        want = recover.to_uint8(images[k : k + 1])[0, 0].numpy()
        assert np.abs(got - want).max() <= 1 and FACTOR == 2


def test_table_page_places_rows_and_columns(tmp_path):
    rows = [("a", torch.linspace(-1, 1, 4).view(4, 1, 1, 1).expand(4, 1, 64, 64))]
    recover.table_page(rows, ["0", "1", "2", "3"], tmp_path / "t.png")
    page = np.asarray(Image.open(tmp_path / "t.png"))
    middle = [page[recover.HEAD + 8 + 32, 150 + k * (64 + recover.GAP) + 32, 0] for k in range(4)]
    assert middle == [0, 85, 170, 255]


@pytest.fixture
def trained(folder):
    train.main(["--data", folder, *TINY, "--epochs", "30", "--device", "cpu"])
    return runs.RUNS / "set"


def test_the_command_leaves_its_pictures_and_prints_errors(trained, capsys):
    recover.main(["--steps", "7", "--n", "4", "--curve"])
    out = capsys.readouterr().out
    assert {p.name for p in trained.glob("recover*.png")} == {
        "recover.png", "recover-noise.png", "recover-code.png",
    }  # fmt: skip
    codes = [float(line.split()[-2]) for line in out.splitlines() if "from code" in line]
    noises = [float(line.split()[-2]) for line in out.splitlines() if "from noise" in line]
    assert len(codes) == len(noises) == 6
    assert codes[4] > codes[0] and codes[4] > noises[4]  # 250 steps against 10; code against noise


@pytest.mark.parametrize("mode", ["interpolate", "swap", "timesteps"])
def test_modes_draw_and_say_where(trained, mode, capsys):
    recover.main(["--mode", mode, "--n", "4"] + ["--steps", "5"] * (mode != "timesteps"))
    assert (trained / f"recover-{mode}.png").exists()
    assert f"recover-{mode}.png" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags",
    [
        ["--steps", "1001"],
        ["--n", "1", "--mode", "swap"],
        ["--mode", "timesteps", "--steps", "5"],
        ["--mode", "swap", "--eta", "1"],
        ["--mode", "interpolate", "--curve"],
    ],
)
def test_bad_input_is_one_line(flags, trained, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        recover.main(flags)
    assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


def test_the_same_seed_draws_the_same_pixels(trained):
    pages = []
    for _ in range(2):
        recover.main(["--steps", "3", "--n", "4", "--eta", "1", "--seed", "3"])
        pages.append((trained / "recover.png").read_bytes())
    assert pages[0] == pages[1] and math.isfinite(len(pages[0]))
