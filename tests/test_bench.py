"""appendix/bench.py: the figures that can be known without a clock, and the report as a whole."""

import json
import time

import pytest
import torch
from conftest import TINY
from PIL import Image

import heads
import train
from appendix import bench, measure


def settings(*flags):
    args = train.build_parser().parse_args(["--data", "mnist", "--device", "cpu", *TINY, *flags])
    args.seed = 0
    return train.resolve(args)


def test_flops_of_a_linear_layer_and_a_convolution_are_counted_by_hand():
    """Twice the multiplications, three times for forward and both gradients; the input of the
    first layers needs no gradient."""
    few, more = (bench.flops_per_image(settings("--model", m)) for m in (
        "patch=4,hidden=16,depth=1,heads=2,base=8,mult=1,2,attention=4,enc_heads=2",
        "patch=4,hidden=16,depth=2,heads=2,base=8,mult=1,2,attention=4,enc_heads=2",
    ))  # fmt: skip
    tokens, d = 4, 16
    linear = tokens * (3 + 1 + 4 + 4) * d * d + 6 * d * d  # qkv, proj, fc1, fc2, and ada once
    scores = 2 * tokens * tokens * d  # q k^T and its product with v, over both heads
    assert more - few == 3 * 2 * (linear + scores)


def test_saved_bytes_fall_with_recomputation_and_count_no_weights():
    plain, again = (
        bench.saved_bytes(settings(*flags)) for flags in ([], ["--checkpoint-activations"])
    )
    assert 0 < again < 0.6 * plain
    big = settings("--model", TINY[3].replace("hidden=16", "hidden=256"))
    weights = 4 * sum(train.parameter_counts(big).values())
    assert bench.saved_bytes(big) < 0.2 * weights
    wide = bench.saved_bytes(settings("--model", TINY[3].replace("base=8", "base=32")))
    assert wide > 2 * plain


def test_speed_is_a_median_with_its_quartiles():
    got = bench.speed([0.1, 0.2, 0.4, 0.2, 0.2], 8)
    assert got["images_per_s"] == pytest.approx(40)
    assert got["quartile_1"] <= got["images_per_s"] <= got["quartile_3"] and got["steps"] == 5


def test_the_report_compares_two_processes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "SECONDS", 0.05)
    monkeypatch.setattr(measure, "ROUNDS", 2)
    monkeypatch.setattr(bench, "matmul_peak", lambda dtype, device: 1e11)
    path = tmp_path / "bench.json"
    bench.main(["--batch-size", "2", "--device", "cpu", "--json", str(path)])
    r, out = json.loads(path.read_text()), capsys.readouterr().out
    assert r["ratio_images_per_s"] == pytest.approx(
        r["program"]["images_per_s"] / r["reference"]["images_per_s"]
    )
    assert r["ratio_peak_memory"] == r["program"]["peak_bytes"] / r["reference"]["peak_bytes"]
    assert set(r["milliseconds"]) == {"data", "forward", "backward", "update"}
    assert all(r[k]["peak_bytes"] > 2**20 for k in ("program", "reference"))
    assert r["mfu"] == pytest.approx(r["flops_per_image"] * r["program"]["images_per_s"] / 1e11)
    for word in ("parameters", "FLOPs", "ratio", "MFU", "saved for backward", "saved: "):
        assert word in out


@pytest.mark.slow  # counting FLOPs at 256 pixels
def test_the_estimate_is_arithmetic_on_what_it_states(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    bench.main(["--estimate"])
    result = json.loads((tmp_path / "results/estimate.json").read_text())
    assert result["measured"] is False and "formula" in result["assumptions"]
    rows = {(r["data"], r["gpus"]): r for r in result["rows"]}
    assert {g for _, g in rows} == {1, 8, 64} and len({d for d, _ in rows}) == 6
    one, eight = rows["cifar10", 1], rows["cifar10", 8]
    a = result["assumptions"]
    by_hand = 200 * 50_000 * one["flops_per_image"] / (a["mfu"] * a["peak_flops"]) / 3600
    assert one["hours"] == pytest.approx(by_hand) and by_hand > 1
    assert by_hand / 8 < eight["hours"] < one["hours"]
    many = rows["oct2017", 64]  # a batch of 16 has no 64 parts
    assert many["batch_size"] == 64 and many["steps"] == round(200 * 83_484 / 64)
    assert "not a measurement" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flag", [["--accum", "2"], ["--compile"], ["--batch-size", "8"], ["--checkpoint-activations"]]
)
def test_flags_of_a_step_are_refused_where_no_step_is_timed(flag, capsys):
    for report in ("--estimate", "--probe"):
        with pytest.raises(SystemExit) as stop:
            bench.main([report, *flag])
        assert stop.value.code == 2 and "belong to a step" in capsys.readouterr().err


def test_growth_draws_what_it_measured(tmp_path):
    rows = [
        {"what": what, "value": value, "images_per_s": 100 / k}
        for what, points in bench.GROWTH.items()
        for k, (value, _) in enumerate(points, 1)
    ]
    bench.growth_chart(rows, tmp_path / "growth.png")
    assert Image.open(tmp_path / "growth.png").size == (1000, 520)


def test_matmul_peak_stops_growing_when_products_take_long():
    assert bench.matmul_peak(torch.float32, torch.device("cpu")) > 1e8


def test_the_cost_of_the_probe_counts_the_time_of_both_parts(monkeypatch):
    """Encoding a part of 1,000 takes 0.1 s here, so 300 images take 0.03 s; the heads are real."""
    monkeypatch.setattr(bench, "encode", lambda e, x, times, *_: time.sleep(1e-4 * len(x)))
    real = heads.train_heads
    monkeypatch.setattr(heads, "train_heads", lambda *a: (real(*a), time.sleep(0.5)))
    r = bench.probe_cost(settings("--preset", "cpu"), 300)
    assert r["encode_s"] == pytest.approx(0.03, rel=0.3) and 0.5 < r["heads_s"] < 20
    e, h = r["encode_s"], r["heads_s"]
    assert r["ratio"] == pytest.approx((100 * e + h) / (e + h))
