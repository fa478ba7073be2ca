"""What a training step costs, and how that compares with the same step written plainly.

    python -m appendix.bench                            the cpu preset on mnist's shapes
    python -m appendix.bench --preset paper --data cifar10 --batch-size 8
    python -m appendix.bench --preset paper --data oct2017 --batch-size 2 --checkpoint-activations
    python -m appendix.bench --growth                   how cost grows: a table and a chart
    python -m appendix.bench --probe --preset paper --data cifar10
    python -m appendix.bench --estimate                 hours of the Table 4 presets on GPUs

Pixels are random, so no data set is needed. Program and plain reference (reference.py) run in
processes of their own and take turns, so that a noisy machine disturbs both alike; memory is what
a process peaked at minus what it had after its imports (on CUDA the allocator's peak). Times are
medians over steps, with the quartiles as spread. MFU is the share of the speed that this machine
reaches in a large matrix product of the same dtype, measured in the same run.
--json FILE writes everything printed, with ratio_images_per_s and ratio_peak_memory (program /
reference) among the keys.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import heads
import probe
import train
from appendix.chart import SHAPES, Canvas, Series, line_panel, style
from appendix.counts import ASSUMED, TRAINING_IMAGES, estimate, flops_per_image, saved_bytes
from appendix.measure import matmul_peak, split_times, take_turns
from features import encode
from files import written_whole
from model import DiER
from runs import (
    Parser,
    fail,
    model_config,
    parameter_counts,
    pick_amp,
    resolve,
    run_main,
    whole,
)

# ---------------------------------------------------------------------------- the report


def speed(times: list[float], batch: int) -> dict[str, float]:
    """Median and quartiles of images a second."""
    low, middle, high = (batch / q for q in reversed(statistics.quantiles(times, n=4)))
    return {"images_per_s": middle, "quartile_1": low, "quartile_3": high, "steps": len(times)}


def compare(settings: dict[str, Any]) -> dict[str, Any]:
    """Everything about one preset: the program beside the plain reference."""
    threads, batch = torch.get_num_threads(), settings["batch_size"]
    plain = {**settings, "amp": "off", "accum": 1, "checkpoint_activations": False}
    sides = take_turns(
        {"program": ("program", settings, threads), "reference": ("reference", plain, threads)}
    )
    device, flops = torch.device(settings["device"]), flops_per_image(settings)
    result: dict[str, Any] = {
        "preset": settings["preset"], "data": settings["data"], "size": settings["size"],
        "batch_size": batch, "device": settings["device"], "amp": settings["amp"],
        "threads": threads, "torch": torch.__version__,
        "parameters": parameter_counts(settings), "flops_per_image": flops,
    }  # fmt: skip
    for name, side in sides.items():
        result[name] = {**speed(side["times"], batch), "peak_bytes": side["peak"]}
    program, reference = result["program"], result["reference"]
    result["ratio_images_per_s"] = program["images_per_s"] / reference["images_per_s"]
    result["ratio_peak_memory"] = program["peak_bytes"] / reference["peak_bytes"]
    result["milliseconds"] = split_times(settings)
    result["saved_bytes_per_image"] = saved_bytes(settings)
    dtypes = [torch.float32, torch.bfloat16] + [torch.float16] * (device.type == "cuda")
    result["peak_flops"] = {str(d).removeprefix("torch."): matmul_peak(d, device) for d in dtypes}
    used = {"off": "float32", "bf16": "bfloat16", "fp16": "float16"}[settings["amp"]]
    result["mfu"] = flops * program["images_per_s"] / result["peak_flops"].get(used, float("nan"))
    return result


def print_report(r: dict[str, Any]) -> None:
    """The report as a person reads it."""
    p, q = r["program"], r["reference"]
    count = sum(r["parameters"].values())
    print(f"preset {r['preset']}, {r['data']} at {r['size']} px, batch {r['batch_size']}, amp "
          f"{r['amp']}, {r['device']} ({r['threads']} threads), torch {r['torch']}")  # fmt: skip
    print(f"parameters        {count:,} (encoder {r['parameters']['encoder']:,}, "
          f"DiT {r['parameters']['dit']:,})")  # fmt: skip
    print(f"FLOPs per image   {r['flops_per_image'] / 1e6:,.1f} M, forward and backward")
    for name, side in (("program", p), ("reference", q)):
        print(f"{name:17} {side['images_per_s']:,.1f} images/s (quartiles {side['quartile_1']:,.1f}"
              f" to {side['quartile_3']:,.1f}, {side['steps']} steps), peak memory "
              f"{side['peak_bytes'] / 2**20:,.0f} MiB")  # fmt: skip
    print(f"ratio             {r['ratio_images_per_s']:.2f} x the images/s at "
          f"{r['ratio_peak_memory']:.2f} x the peak memory of the plain reference")  # fmt: skip
    parts = ", ".join(f"{name} {ms:.1f}" for name, ms in r["milliseconds"].items())
    print(f"milliseconds      {parts}")
    print(f"saved for backward {r['saved_bytes_per_image'] / 1024:,.0f} KiB an image")
    peaks = ", ".join(f"{name} {f / 1e9:,.1f}" for name, f in r["peak_flops"].items())
    print(f"matrix product    {peaks} GFLOP/s; MFU {100 * r['mfu']:.1f}%")


# ---------------------------------------------------------------------------- growth

GROWTH = {  # what grows: for each point its value and the flags of train.py that set it
    "batch": [(n, ["--batch-size", str(n)]) for n in (8, 16, 32, 64, 128)],
    "resolution": [(n, ["--size", str(n)]) for n in (32, 64, 128, 256)],
    "depth": [(n, ["--model", f"depth={n}"]) for n in (2, 4, 8, 16)],
    "width": [(n, ["--model", f"hidden={n}"]) for n in (64, 128, 256, 512)],
    "threads": [(n, []) for n in (1, 2, 4, 8, 16)],
}
MEANING = {
    "batch": "images/s rise with the batch until the processor is full; steps/s, which count more "
    "in a short run, only fall",
    "resolution": "twice the side costs an image three to nine times the time: four times the "
    "pixels, and attention over four times the tokens; choose the size before anything else",
    "depth": "time grows in a line with the DiT's depth above the encoder's constant share",
    "width": "parameters grow with the square of the width; time does so only once products are "
    "large enough to fill the processor",
    "threads": "a small preset gains less than twice from a second thread: two runs of one thread "
    "each do more work than one run of two",
}


def growth(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows {what, value, images_per_s, seconds_per_step, peak_bytes} of the program's step."""
    rows, cores = [], torch.get_num_threads()
    for what, points in GROWTH.items():
        for value, flags in points:
            if what == "threads" and value > cores:
                continue
            threads = value if what == "threads" else cores
            small = [] if what != "resolution" else ["--batch-size", str(max(1, 4096 // value**2))]
            settings = settings_of(args, [*small, *flags])
            side = take_turns({"program": ("program", settings, threads)}, rounds=2)["program"]
            seconds, batch = statistics.median(side["times"]), settings["batch_size"]
            row = {"what": what, "value": value, "batch_size": batch, "seconds_per_step": seconds}
            row |= {"images_per_s": batch / seconds, "peak_bytes": side["peak"]}
            row["parameters"] = sum(parameter_counts(settings).values())
            rows.append(row)
            print(f"{what:10} {value:5d}  {batch / seconds:9.1f} images/s  {1e3 * seconds:9.1f} ms"
                  f"  {side['peak'] / 2**20:8,.0f} MiB  {row['parameters']:12,} parameters",
                  flush=True)  # fmt: skip
        print(f"  {what}: {MEANING[what]}")
    return rows


def growth_chart(rows: list[dict[str, Any]], path: Path) -> None:
    """Time for one image against each thing that grows, both relative to the first point."""
    canvas, series = Canvas(1000, 520), []
    for k, what in enumerate(GROWTH):
        mine = [r for r in rows if r["what"] == what]
        per_image = [1 / r["images_per_s"] for r in mine]
        x = [r["value"] / mine[0]["value"] for r in mine]
        y = [p / per_image[0] for p in per_image]
        first = f"{what} (1 = {mine[0]['value']})"
        series.append(Series(first, x, y, *style(k)[:1], shape=SHAPES[k]))
    line_panel(
        canvas, (100, 60, 740, 440), series, "How the time for one image grows",
        "times as much of it", "time for one image, 1 = at the first point",
        log_x=True, log_y=True,
    )  # fmt: skip
    canvas.save(path)


# ---------------------------------------------------------------------------- the probe


def probe_cost(settings: dict[str, Any], images: int) -> dict[str, float]:
    """Seconds to encode `images` once for each of the 11 t (E, measured on a part and scaled) and
    to train all their heads (H, measured whole on random features), and how much cheaper that is
    than encoding again in each of 100 epochs: (100 E + H) / (E + H)."""
    device = torch.device(settings["device"])
    encoder = DiER(model_config(settings)).encoder.to(device)
    part = 1000 if settings["preset"] == "cpu" else 16
    shape = (part, settings["channels"], settings["size"], settings["size"])
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    amp = pick_amp(settings["amp"], device)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        encode(encoder, pixels, probe.TIMES, device, amp, "a part")
        times.append(time.perf_counter() - start)
    encoding = statistics.median(times[1:]) * images / part
    classes = settings["classes"]
    features = torch.randn(images, len(probe.TIMES), 1024).half()
    labels = torch.randint(classes, (images,))
    folds = torch.from_numpy(heads.make_folds(images, None, 0))
    start = time.perf_counter()
    heads.train_heads(features, labels, folds, classes, 100, 2e-4, 256, 0)
    training = time.perf_counter() - start
    ratio = (100 * encoding + training) / (encoding + training)
    return {"images": images, "encode_s": encoding, "heads_s": training, "ratio": ratio}


# ---------------------------------------------------------------------------- command line


def settings_of(args: argparse.Namespace, more: list[str] | None = None) -> dict[str, Any]:
    """Resolved settings of train.py for the flags given here, and `more` of its flags."""
    flags = ["--data", args.data, "--preset", args.preset, "--device", args.device]
    flags += ["--amp", args.amp, "--accum", str(args.accum)]
    flags += ["--batch-size", str(args.batch_size)] if args.batch_size else []
    flags += ["--checkpoint-activations"] if args.checkpoint_activations else []
    flags += ["--compile"] if args.compile else []
    parsed = train.build_parser().parse_args([*flags, *(more or [])])
    parsed.seed = 0
    return resolve(parsed)


def build_parser() -> argparse.ArgumentParser:
    """Every flag, with its unit and default."""
    p = Parser(prog="python -m appendix.bench", description="What a training step costs.")
    names = [n for n in TRAINING_IMAGES] + ["glyphs"]
    p.add_argument("--data", choices=names, default="mnist", help="whose shapes (mnist)")
    p.add_argument("--preset", choices=["auto", "paper", "cpu"], default="auto",
                   help="sizes of the model (auto: paper with CUDA, else cpu)")  # fmt: skip
    p.add_argument("--device", default="auto", help="auto, cpu, cuda (auto)")
    p.add_argument("--amp", choices=["auto", "bf16", "fp16", "off"], default="auto",
                   help="precision of the program; the reference is fp32 (auto)")  # fmt: skip
    p.add_argument("--batch-size", type=whole, help="images a step (the preset's)")
    p.add_argument("--accum", type=whole, default=1, help="pieces of a batch (1)")
    p.add_argument("--compile", action="store_true", help="torch.compile the program (off)")
    p.add_argument("--checkpoint-activations", action="store_true",
                   help="compute activations again in backward (off)")  # fmt: skip
    p.add_argument("--growth", action="store_true",
                   help="how cost grows with batch, resolution, depth, width, threads")  # fmt: skip
    p.add_argument("--probe", action="store_true",
                   help="the 11-step probe against encoding anew in each epoch")  # fmt: skip
    p.add_argument("--estimate", action="store_true",
                   help="hours and memory of the Table 4 presets, by arithmetic; writes "
                   "results/estimate.json")  # fmt: skip
    p.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    return p


def main(argv: list[str] | None = None) -> None:
    """One of the four reports."""
    args = build_parser().parse_args(argv)
    path, step_flags = args.json, ("batch_size", "compile", "checkpoint_activations")
    if (args.estimate or args.probe) and (args.accum > 1 or any(vars(args)[f] for f in step_flags)):
        fail("--batch-size, --accum, --compile and --checkpoint-activations belong to a step: "
             "leave them out")  # fmt: skip
    if args.estimate:
        result: Any = estimate()
        path = path or Path("results/estimate.json")
        for r in result["rows"]:
            print(f"{r['data']:14} {r['gpus']:3d} GPU(s)  {r['hours']:9,.1f} hours  "
                  f"{r['memory_gb']:7.1f} GB each")  # fmt: skip
        print("an estimate, not a measurement: " + ASSUMED["formula"])
    elif args.growth:
        result = growth(args)
        growth_chart(result, Path("results/growth.png"))
        print("chart: results/growth.png")
    elif args.probe:
        settings = settings_of(args)
        result = probe_cost(settings, TRAINING_IMAGES.get(args.data, 10_000))
        print(f"encoding {result['images']:,} images at 11 t: {result['encode_s']:,.1f} s (on a "
              f"part, scaled); their heads, 100 epochs: {result['heads_s']:,.1f} s; "
              f"{result['ratio']:.1f} x cheaper than encoding in each epoch")  # fmt: skip
    else:
        result = compare(settings_of(args))
        print_report(result)
    if path:
        with written_whole(path) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n")
        print(f"saved: {path}")


if __name__ == "__main__":
    run_main(main)
