"""appendix/recover.py: the chain with an oracle, the four modes, the command."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, fails, write_folder

import data
import diffusion
import train
from appendix import recover


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


class Still(Oracle):
    """A model that sees no noise: what it decodes is the code, whatever v says."""

    def dit(self, x_t, t, v):
        return torch.zeros_like(x_t)


def images(n, bound=1.0):
    """Random images (n, 1, 4, 4) in [-bound, bound], float64."""
    generator = torch.Generator().manual_seed(n)
    return (torch.rand(n, 1, 4, 4, dtype=torch.float64, generator=generator) * 2 - 1) * bound


# ---------------------------------------------------------------------------- the chain


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_an_oracle_recovers_the_image_from_noise_and_from_its_code(steps):
    model, x0 = Oracle(), images(3)
    v = recover.trajectory(model, x0, diffusion.ddim_times(steps))
    assert model.seen == diffusion.ddim_times(steps)  # once for each step used
    noise = recover.standard_noise(x0, 0)
    got = recover.walk(diffusion.ddim_sample, model, v, noise, "from noise", clip=True)
    assert torch.allclose(got, x0, atol=1e-9)
    code = recover.walk(diffusion.ddim_invert, model, v, x0, "inversion")
    assert steps == 1 or not torch.allclose(code, x0, atol=0.1)
    got = recover.walk(diffusion.ddim_sample, model, v, code, "from code", clip=False)
    assert torch.allclose(got, x0, atol=1e-9)


def test_a_slow_walk_shows_its_progress(monkeypatch, capsys):
    class Talking(Oracle):
        def dit(self, x_t, t, v):
            print("a step")
            return super().dit(x_t, t, v)

    clock = iter(range(0, 1_000, 20))
    monkeypatch.setattr(data.time, "monotonic", lambda: next(clock))
    v = recover.trajectory(Oracle(), images(2), diffusion.ddim_times(5))
    capsys.readouterr()
    recover.walk(diffusion.ddim_invert, Talking(), v, images(2), "inversion")
    lines = [line.split(",")[0] for line in capsys.readouterr().out.splitlines()]
    assert lines[:3] == ["a step", "inversion: 1 of 5 steps", "a step"]


def test_a_method_with_a_unet_is_walked_by_it():
    class Other(Oracle):
        dit = None

        def unet(self, x_t, t, v):
            return x_t + t.view(-1, 1, 1, 1) + v.view_as(x_t)

    x0 = images(2)
    got = recover.predict_eps(Other(), x0, 7, x0.flatten(1))
    assert torch.equal(got, x0 + 7 + x0)


def test_slerp_keeps_the_length_and_meets_both_ends():
    a, b = torch.randn(2, 5, 1, 8, 8, dtype=torch.float64)
    assert torch.allclose(recover.slerp(a, b, 0.0), a)
    assert torch.allclose(recover.slerp(a, b, 1.0), b)
    assert torch.allclose(recover.slerp(a, a, 0.5), a)
    a, b = (x / x.flatten(1).norm(dim=1).view(-1, 1, 1, 1) for x in (a, b))
    middle = recover.slerp(a, b, 0.3).flatten(1)
    assert torch.allclose(middle.norm(dim=1), torch.ones(5, dtype=torch.float64))
    angle = (a.flatten(1) * b.flatten(1)).sum(1).acos()
    assert torch.allclose((middle * a.flatten(1)).sum(1).acos(), 0.3 * angle)


def test_score_against_numpy():
    x0 = torch.rand(4, 3, 5, 5) * 2 - 1
    x = x0 + 0.3 * torch.randn(x0.shape)
    a, b = ((y.clamp(-1, 1).numpy() + 1) / 2 for y in (x, x0))
    errors = ((a - b) ** 2).reshape(4, -1).mean(1)
    mse, psnr = recover.score(x, x0)
    assert mse == pytest.approx(errors.mean(), rel=1e-5)
    assert psnr == pytest.approx(np.mean(10 * np.log10(1 / errors)), rel=1e-5)


# ---------------------------------------------------------------------------- the modes


@pytest.fixture
def page(monkeypatch):
    """What a mode would draw: {label: rows of images in [0, 255]} and the heads."""
    drawn = {}

    def image_grid(rows, heads, path, title=""):
        assert all(x.dtype == np.uint8 and x.ndim == 4 for _, x in rows)
        drawn.update(rows=[(label, x.astype(int)) for label, x in rows], heads=heads)

    monkeypatch.setattr(recover, "image_grid", image_grid)
    return drawn


def same(row, want):
    """Do uint8 images show those in [-1, 1]? Rounded; and the code is of x at t = 0, not of x_0."""
    return np.abs(row - (want.clamp(-1, 1).numpy() + 1) * 127.5).max() <= 0.51


@pytest.fixture
def walks(monkeypatch):
    """Where each walk ended: {what it is: images}."""
    ends, real = {}, recover.walk

    def walk(function, model, v, x, what, **more):
        ends[what] = real(function, model, v, x, what, **more)
        return ends[what]

    monkeypatch.setattr(recover, "walk", walk)
    return ends


def test_only_decoding_from_noise_clips(page, walks, tmp_path, capsys):
    x0 = images(3, bound=2.0)
    recover.recover(Oracle(), x0, 7, 0, tmp_path)
    assert [label for label, _ in page["rows"]] == ["image", "from noise", "from code"]
    assert all(same(row, x0) for _, row in page["rows"])
    assert walks["from noise"].abs().max() <= 1 < x0.abs().max()
    assert torch.allclose(walks["from code"], x0, atol=1e-9)
    lines = capsys.readouterr().out.splitlines()
    for name, line in zip(("noise", "code"), lines, strict=True):
        mse, psnr = recover.score(walks[f"from {name}"], x0)
        assert line == f"   7 steps from {name:5}  MSE {mse:.5f}  PSNR {psnr:5.2f} dB"


def test_interpolation_goes_from_the_first_image_to_the_second(page, tmp_path):
    x0 = images(5)  # the fifth has no partner
    recover.interpolate(Oracle(), x0, 7, tmp_path)
    assert len(page["rows"]) == 2
    assert page["heads"] == ["image", *(f"{k / 6:.2f}" for k in range(7)), "image"]
    for (_, row), (a, b) in zip(page["rows"], ((x0[0], x0[1]), (x0[2], x0[3]))):
        shown = [a, *(torch.lerp(a, b, k / 6) for k in range(7)), b]
        assert same(row, torch.stack(shown))  # the oracle's v is the image, so v's line is seen
    recover.interpolate(Still(), x0, 7, tmp_path)
    for (_, row), (a, b) in zip(page["rows"], ((x0[:1], x0[1:2]), (x0[2:3], x0[3:4]))):
        shown = [a, *(recover.slerp(a, b, k / 6) for k in range(7)), b]
        assert same(row, torch.cat(shown))


def test_swap_puts_codes_in_rows_and_v_in_columns(page, tmp_path, capsys):
    x0 = images(3)
    recover.swap(Oracle(), x0, 7, tmp_path)
    labels = [label for label, _ in page["rows"]]
    assert labels == ["v of", "code of", "code of", "code of"]
    assert same(page["rows"][0][1][1:], x0) and (page["rows"][0][1][0] == 255).all()
    for i in range(3):  # the oracle's v is the image itself: column j shows image j in each row
        row = page["rows"][i + 1][1]
        assert same(row[0], x0[i]) and same(row[1:], x0)
    out = capsys.readouterr().out
    recover.swap(Still(), x0, 7, tmp_path)
    for i in range(3):
        assert same(page["rows"][i + 1][1], x0[i : i + 1].expand(4, 1, 4, 4))
    apart = recover.score(x0, x0.roll(1, 0))[0]
    assert out == (
        f"own v: MSE 0.00000; another's v: {apart:.5f} to the image of the code, 0.00000 to the "
        "image of v\n"
    )


def test_one_step_estimates_use_the_v_that_the_row_names(page, tmp_path, capsys):
    x0 = images(6)
    mean = {t: torch.full((1, 16), 0.25, dtype=torch.float64) for t in recover.TIMES}
    recover.timesteps(Oracle(), x0, mean, 0, tmp_path)
    assert page["heads"] == [f"t = {t}" for t in recover.TIMES] and len(page["rows"]) == 4 * 5
    kinds = ["x_t", "right v", "another's v", "mean v", "zero v"]
    rows = page["rows"][5:10]  # of the second image
    assert [name for name, _ in rows] == kinds
    wants = [x0[1], x0[0], 0.25 + 0 * x0[1], 0 * x0[1]]
    for (name, row), want in zip(rows[1:], wants):
        assert same(row, want.expand(11, 1, 4, 4)), name
    abar, eps = diffusion.alphas_cumprod(), recover.standard_noise(x0, 0)
    noisy = [(a**0.5 * x0 + (1 - a) ** 0.5 * eps)[1] for a in abar[recover.TIMES]]
    assert same(rows[0][1], torch.stack(noisy))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0].strip() for line in lines[1:]] == kinds[1:]
    assert lines[1].split()[2:] == ["0.0000"] * 11


def test_the_mean_v_is_that_of_all_images(monkeypatch):
    monkeypatch.setattr(recover, "BLOCK", 4)
    pixels = np.random.default_rng(0).integers(0, 256, (10, 1, 4, 4), np.uint8)
    mean = recover.mean_of_v(Oracle(), pixels, torch.device("cpu"))
    want = (pixels.reshape(10, 16) / 127.5 - 1).mean(0)
    assert list(mean) == recover.TIMES
    assert all(np.allclose(v.numpy(), want, atol=1e-6) for v in mean.values())


# ---------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run, in the current directory while these tests last."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("recover"))
        write_folder(Path("set"))
        train.main(["--data", "set", *TINY, "--epochs", "30"])
        yield train.RUNS / "set"


def test_the_command_prints_errors_and_says_where_its_picture_is(trained, capsys):
    printed = {}
    for steps in ("7", "100"):
        recover.main(["--steps", steps, "--n", "4"])
        out = capsys.readouterr().out
        psnr = [float(line.split()[-2]) for line in out.splitlines() if "PSNR" in line]
        printed[steps] = dict(zip(("noise", "code"), psnr, strict=True))
        assert "4 test images" in out and f"saved: {trained}/recover.png" in out
    assert printed["100"]["code"] > max(printed["7"]["code"], printed["100"]["noise"])
    first = (trained / "recover.png").read_bytes()
    recover.main(["--steps", "100", "--n", "4", "--seed", "0"])
    assert (trained / "recover.png").read_bytes() == first
    recover.main(["--steps", "100", "--n", "4", "--seed", "1"])
    assert (trained / "recover.png").read_bytes() != first


@pytest.mark.parametrize("mode", ["interpolate", "swap", "timesteps"])
def test_modes_draw_and_say_where(trained, mode, capsys):
    recover.main(["--mode", mode, "--n", "4", *(["--steps", "5"] if mode != "timesteps" else [])])
    assert (trained / f"recover-{mode}.png").exists()
    assert f"saved: {trained}/recover-{mode}.png" in capsys.readouterr().out


def test_swap_takes_the_first_eight_of_the_sixteen(trained, monkeypatch, capsys):
    seen = {}
    for name in ("swap", "recover"):
        monkeypatch.setattr(recover, name, lambda model, x0, *_, name=name: seen.update({name: x0}))
        recover.main(["--mode", name])
    assert len(seen["recover"]) == 16 and torch.equal(seen["swap"], seen["recover"][:8])
    assert ": 8 test images" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--steps", "1001"], "1001 is not a whole number from 1 to 1000"),
        (["--n", "0"], "0 is not a whole number above 0"),
        (["--n", "1", "--mode", "swap"], "--mode swap needs two test images or more: give --n 2"),
        (["--n", "1", "--mode", "timesteps"], "--mode timesteps needs two test images or more"),
        (["--mode", "timesteps", "--steps", "5"], "walks no chain: leave --steps out"),
        (["--mode", "nonsense"], "invalid choice: 'nonsense'"),
        (["--name", "baselines/none"], "no checkpoint in runs/baselines/none"),
    ],
)
def test_bad_input_is_one_line(trained, flags, words, capsys):
    for path in trained.glob("recover*"):
        path.unlink()
    assert words in fails(capsys, recover.main, flags)
    assert not list(trained.glob("recover*"))


@pytest.mark.parametrize("method", ["mae", "supervised", "dier-unet"])
def test_runs_of_other_methods(trained, method, capsys):
    """A run of a method that predicts the noise is drawn; another gets one line."""
    saved = torch.load(trained / "checkpoint.pt", weights_only=True)
    saved["settings"] |= {"method": method, "size": 16}
    folder = train.RUNS / "baselines" / method
    folder.mkdir(parents=True)
    if method == "dier-unet":
        torch.manual_seed(0)
        net = recover.METHODS[method][0](saved["settings"])
        saved["ema"] = net.state_dict()
    torch.save(saved, folder / "checkpoint.pt")
    command = ["--name", f"baselines/{method}", "--n", "2", "--steps", "2"]
    if method == "dier-unet":
        recover.main(command)
        assert (folder / "recover.png").exists()
    else:
        error = fails(capsys, recover.main, command)
        assert f"a run of {method} makes no images: nothing can be recovered" in error
