"""Train and probe what DiER is compared with, and fill Table 1 for this machine.

    python -m appendix.baselines --method mae --data mnist           train as train.py, then probe
    python -m appendix.baselines --method mae --run mnist --resume   go on, then probe
    python -m appendix.baselines --probe --run mnist                 probe again: probe.py's flags
    python -m appendix.baselines --table --data mnist --minutes 3 --seeds 2
    python -m appendix.baselines --table --methods dier,dier-notime --minutes 30 --seeds 2 \\
        --data mnist --out runs/time-mnist.json

The methods stand in methods.py, the table in table.py. A run's folder is as train.py and probe.py
leave it; where v does not depend on t, probe.json has one row with t null.

--table gives every method and seed the same minutes (or --epochs), probes each on 10,000 labels and
writes runs/table1-DATA.json after each cell: method and seed. A cell that is in the file is not
run again, so a table can be stopped and goes on; the cell in work is then trained from its start.
"""

import argparse
import json
import sys
from pathlib import Path

import probe
import train
from appendix.methods import METHODS, method_of
from appendix.table import make_table, parse_names
from parallel import world_from_environment
from runs import (
    BASELINES,
    DIER,
    Parser,
    fail,
    find_run,
    newest_run,
    read_checkpoint,
    require_method,
    run_main,
    run_path,
    whole,
)  # fmt: skip
from runs import (
    build_parser as training_parser,
)


def build_parser() -> argparse.ArgumentParser:
    """train.py's flags and those of this command."""
    p = training_parser(__doc__)
    p.prog, p.description = "python -m appendix.baselines", "Methods that DiER is compared with."
    p.add_argument("--method", choices=list(METHODS), help="what to train (that of --run)")
    p.add_argument("--probe", action="store_true", help="probe --run again; takes probe.py's flags")
    p.add_argument("--table", action="store_true", help="run all methods, write Table 1")
    p.add_argument("--methods", help="only these of the table, such as dier,dier-notime (all)")
    p.add_argument("--seeds", type=whole, help="runs of each method in the table (1)")
    p.add_argument("--out", type=Path, help="file of the table (runs/table1-DATA.json)")
    return p


def probe_parser() -> argparse.ArgumentParser:
    """probe.py's flags, and --method to find the newest run of one."""
    p = Parser(prog="python -m appendix.baselines --probe", parents=[probe.build_parser()],
               add_help=False)  # fmt: skip
    p.add_argument("--probe", action="store_true", help="this command")
    p.add_argument("--method", choices=list(METHODS), help="whose newest run (all but dier)")
    return p


def probe_again(args: argparse.Namespace) -> None:
    """Probe the run that --run names, or the newest of --method, or of all but dier."""
    names = [args.method] if args.method else [name for name in METHODS if name != DIER.name]
    newest = [path for name in names if not args.run and (path := newest_run(METHODS[name]))]
    if newest:
        run = max(newest, key=lambda path: (path / "checkpoint.pt").stat().st_mtime)
    else:
        run = find_run(args.run, METHODS[args.method or "mae"])
    state = read_checkpoint(run)
    method = method_of(state["settings"])
    if args.method:
        require_method(run, state["settings"], METHODS[args.method], f"{BASELINES} --probe")
    probe.probe_run(run, state, args, method)


def train_and_probe(args: argparse.Namespace) -> None:
    """One run of --method, or the one to resume; probed by probe.py's standard protocol."""
    if args.method is None and args.resume and args.run:
        path = run_path(args.run)
        if not (path / "checkpoint.pt").exists():
            fail(f"no checkpoint in {path}: start with --method NAME --run {args.run}")
        args.method = method_of(read_checkpoint(path)["settings"]).name
    if args.method is None:
        fail(f"--method is needed: one of {', '.join(METHODS)}; or --table, or --probe")
    method = METHODS[args.method]
    result = train.start(argparse.Namespace(**{**vars(args), "json": False}), method)
    if not args.dry_run and world_from_environment().size == 1:
        flags = ["--run", result["run"], "--device", args.device, "--amp", args.amp]
        run, state = Path(result["run"]), read_checkpoint(Path(result["run"]))
        found = probe.probe_run(run, state, probe.build_parser().parse_args(flags), method)
        result["probe"] = found
    if args.json:
        print(json.dumps(result))


def main(argv: list[str] | None = None) -> None:
    """Train and probe, probe again, or make the table."""
    argv = sys.argv[1:] if argv is None else argv
    if "--probe" in argv:
        probe_again(probe_parser().parse_args(argv))
        return
    args = build_parser().parse_args(argv)
    for flag in ("methods", "seeds", "out"):
        if getattr(args, flag) and not args.table:
            fail(f"--{flag} belongs to --table")
    if args.table:
        make_table(args, parse_names(args.methods))
    else:
        train_and_probe(args)


if __name__ == "__main__":
    run_main(main)
