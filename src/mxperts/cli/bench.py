"""``mxperts bench``: how fast a layer or a model runs, and how fast it could."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from mxperts.benchmark import Plan, Status, bench_layer, choose, emulation, parse_shape, report
from mxperts.benchmark.contenders import CUDA_PEERS, INSTALLED, PEERS, default_backends
from mxperts.benchmark.device import device_of
from mxperts.benchmark.model import (
    ARCHITECTURES,
    MODEL_PEERS,
    bench_model,
    choose_models,
    parse_tests,
    subject_of,
    write_random_model,
)
from mxperts.benchmark.model.row import LEFT as MODEL_LEFT
from mxperts.benchmark.model.row import model_table
from mxperts.benchmark.parallel import LEFT as EP_LEFT
from mxperts.benchmark.parallel import OURS, Group, bench_ep, ep_table
from mxperts.benchmark.plot import plot
from mxperts.benchmark.problem import SHAPES, check_device
from mxperts.cli import processes
from mxperts.cli.options import ModelArgument, OutputOption, ThreadsOption, resolve_model, use_threads
from mxperts.cli.output import Table, say, show
from mxperts.errors import ArgumentError
from mxperts.evaluation.plot import drawing
from mxperts.evaluation.schemes import parse

bench = typer.Typer(
    help="Time a layer or a model; rows as in llama-bench.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ShapesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[SHAPES]...",
        help=f"Sizes E,k,H,I, or names: {', '.join(SHAPES)}. Default: small.",
        show_default=False,
    ),
]
SaveOption = Annotated[
    Path | None,
    typer.Option("--save", dir_okay=False, help="Append every row, with machine, versions and commit, as a JSON line."),
]
BackendsOption = Annotated[
    str | None,
    typer.Option("--backends", help="Of mxperts, separated by commas; default: those that are built for speed."),
]
BaselineOption = Annotated[
    bool, typer.Option("--baseline/--no-baseline", help="Row 0: all experts dequantised in every call.")
]


@bench.command(epilog="Example: mxperts bench layer gpt-oss-20b --tokens 1,16,512 --schemes w4a16,w4a4")
def layer(
    shapes: ShapesArgument = None,
    tokens: Annotated[str, typer.Option(help="Tokens in a call, separated by commas.")] = "1,4,16,64,512",
    schemes: Annotated[str, typer.Option(help="Names separated by commas, 'common' or 'all'.")] = "w_mxfp4",
    backends: BackendsOption = None,
    peers: Annotated[
        str,
        typer.Option(
            help=f"Names separated by commas, 'installed' or 'none'; known: {', '.join(PEERS)}; "
            f"on cuda: {', '.join(CUDA_PEERS)}."
        ),
    ] = "installed",
    baseline: BaselineOption = True,
    activation: Annotated[str, typer.Option(help="silu or swigluoai.")] = "silu",
    rounds: Annotated[int, typer.Option(min=1, help="Undisturbed rounds of all contenders.")] = Plan.rounds,
    time_budget: Annotated[
        float, typer.Option(min=0, help="Seconds for the timing of one problem.")
    ] = Plan.time_budget,
    seed: Annotated[int, typer.Option(min=0, help="Of weights, states and routings.")] = 0,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    threads: ThreadsOption = None,
    save: SaveOption = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", help="Draw time against tokens, and the bound, to this PNG.")
    ] = None,
    output: OutputOption = None,
) -> None:
    """Time one layer's experts from packed weights, beside the baseline, other software and the machine's limits.

    Results are checked against the reference before anything is timed; a contender whose error is too large is not
    timed, and the exit code is 1. On cuda, a contender that fails does not end the benchmark, but the exit code is 1.
    """
    use_threads(threads)
    where = device_of(device)
    if plot_file is not None:
        drawing()
    contenders = choose(
        None if backends is None else _names(backends),
        [] if peers == "none" else _names(peers),
        baseline=baseline,
        device=device,
    )
    problems = bench_layer(
        [parse_shape(text) for text in shapes or ["small"]],
        parse(schemes),
        [_tokens(text) for text in _names(tokens)],
        contenders,
        activation=activation,
        device=device,
        seed=seed,
        plan=Plan(rounds=rounds, time_budget=time_budget, slice=where.slice),
        progress=say,
    )
    rows, found = [], report.conditions(where.machine())
    for of_problem in problems:
        rows += of_problem
        if save is not None:
            report.save(save, [row.record() for row in of_problem], found)
    header, cells, note = report.table(rows)
    records = [row.record() for row in rows]
    show(
        Table(header=header, rows=cells, left=report.LEFT, note=note),
        records=records,
        document={"conditions": found, "rows": records},
        output=output,
    )
    if plot_file is not None:
        plot(rows, plot_file)
        say(f"drawn: {plot_file}")
    if any(row.status in (Status.WRONG, Status.FAILED) for row in rows):
        raise typer.Exit(1)


@bench.command(epilog="Example: mxperts bench model --random qwen3-30b-a3b --layers 4 --pp 128 --tg 32")
def model(
    model: ModelArgument = None,
    random: Annotated[
        str | None,
        typer.Option(
            help=f"Instead of a model, layers of these sizes with random weights: {', '.join(ARCHITECTURES)}."
        ),
    ] = None,
    layers: Annotated[int, typer.Option(min=1, help="Of a random model.")] = 4,
    scheme: Annotated[
        str | None,
        typer.Option(help="Of a random model, or of a model that is quantised while it loads; default: w_mxfp4."),
    ] = None,
    pp: Annotated[
        str | None,
        typer.Option(help="Lengths of prompts, separated by commas; 0: none. Default: 512, or what the model can see."),
    ] = None,
    tg: Annotated[
        str | None,
        typer.Option(help="Numbers of tokens to generate; 0: none. Default: 128, or what the model can see."),
    ] = None,
    backends: BackendsOption = None,
    peers: Annotated[
        str, typer.Option(help=f"Names separated by commas, 'installed' or 'none'; known: {', '.join(MODEL_PEERS)}.")
    ] = INSTALLED,
    baseline: BaselineOption = True,
    repetitions: Annotated[int, typer.Option("--repetitions", "-r", min=1, help="Undisturbed runs of a test.")] = 5,
    time_budget: Annotated[float, typer.Option(min=0, help="Seconds for one test of one contender.")] = 30.0,
    seed: Annotated[int, typer.Option(min=0, help="Of tokens, and of random weights.")] = 0,
    device: Annotated[str, typer.Option("--device", help="cpu.")] = "cpu",
    threads: ThreadsOption = None,
    save: SaveOption = None,
    output: OutputOption = None,
) -> None:
    """Time a whole model: prompt processing (pp) and generation (tg) in tokens a second, and peak memory."""
    use_threads(threads)
    check_device(device, ("cpu",))
    if random is not None and model is not None:
        raise typer.BadParameter("takes the place of a model", param_hint="--random")
    with ExitStack() as stack:
        if random is not None:
            path = stack.enter_context(tempfile.TemporaryDirectory(prefix="mxperts-bench-")) + f"/{random}"
            write_random_model(random, Path(path), layers=layers, scheme=scheme or "w_mxfp4", seed=seed)
        else:
            path = resolve_model(model)
        subject = subject_of(path, None if random else scheme, name=f"{random}, {layers} layers" if random else None)
        tests = parse_tests(subject, pp, tg)
        chosen = default_backends() if backends is None else _names(backends)
        if baseline:
            chosen.insert(0, stack.enter_context(emulation.registered()))
        contenders = choose_models(subject, chosen, [] if peers == "none" else _names(peers))
        rows = bench_model(
            subject,
            contenders,
            tests,
            repetitions=repetitions,
            time_budget=time_budget,
            seed=seed,
            progress=say,
        )
    found, records = report.conditions(), [row.record() for row in rows]
    if save is not None:
        report.save(save, records, found)
    header, cells, note = model_table(rows)
    show(
        Table(header=header, rows=cells, left=MODEL_LEFT, note=note),
        records=records,
        document={"conditions": found, "rows": records},
        output=output,
    )
    if any(row.status is Status.WRONG for row in rows):
        raise typer.Exit(1)


@bench.command(
    epilog="Example: torchrun --nproc-per-node 4 -m mxperts bench ep qwen3-30b-a3b --device cuda --schemes w4a16,w4a4"
)
def ep(
    shapes: ShapesArgument = None,
    tokens: Annotated[str, typer.Option(help="Tokens of each process, separated by commas.")] = "1,64,512",
    schemes: Annotated[str, typer.Option(help="Names separated by commas, 'common' or 'all'.")] = "w4a16,w4a4",
    time_budget: Annotated[float, typer.Option(min=0, help="Seconds for each of what is timed.")] = 2.0,
    seed: Annotated[int, typer.Option(min=0, help="Of weights, states and routings.")] = 0,
    device: Annotated[str, typer.Option("--device", help="cpu, joined by gloo, or cuda, by NCCL.")] = "cpu",
    threads: ThreadsOption = None,
    save: SaveOption = None,
    output: OutputOption = None,
) -> None:
    """Time one layer whose experts are spread over processes, count what they send, and compare bits with one process.

    torchrun starts the processes; without it there is one. Beside our exchange stands that of Transformers. The exit
    code is 1 if a result of ours is not that of one process, bit for bit.
    """
    use_threads(threads)
    check_device(device)
    rows, found = [], report.conditions(device_of(device).machine())
    with Group(device) as group:
        for of_problem in bench_ep(
            [parse_shape(text) for text in shapes or ["small"]],
            parse(schemes),
            [_tokens(text) for text in _names(tokens)],
            group,
            seed=seed,
            time_budget=time_budget,
            progress=say,
        ):
            rows += of_problem
            if save is not None and group.rank == 0:
                report.save(save, [row.record() for row in of_problem], found)
    header, cells, note = ep_table(rows)
    records = [row.record() for row in rows]
    show(
        Table(header=header, rows=cells, left=EP_LEFT, note=note),
        records=records,
        document={"conditions": found, "rows": records},
        output=output,
    )
    if any(row.exchange == OURS and row.measured is not None and not row.measured.bit_equal for row in rows):
        raise typer.Exit(1)


@bench.callback()
def _one_process(ctx: typer.Context) -> None:
    if processes.count() > 1 and ctx.invoked_subcommand != "ep":
        raise ArgumentError(
            f"`mxperts bench {ctx.invoked_subcommand}` runs in one process; start it without torchrun, which is for "
            "`mxperts bench ep`"
        )


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _tokens(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise typer.BadParameter(f"{text!r} is no number of tokens", param_hint="--tokens")
    return int(text)
