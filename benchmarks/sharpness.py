"""Sharpness measures of one trained narrow ResNet-18, three comparisons in one run on one core.

Suite: all measures of the published procedure to a standard error of 2 %, on all examples and on a subset of them,
stratified by the loss (whose sampling error is then in the standard error), against that procedure in plain PyTorch
(`_published.py`).
By default a fraction of each of its loops is run, and its time is scaled by how much was left out: every loop is so
many equal units, one at least is run, and eps_sharpness, whose length is not known beforehand, is run to its end.

Peers: each measure that rests on Hessian-vector products against PyHessian and curvlinops at equal error, in the metric
`identity`, all on the same batches. Ours is measured to its tolerance and the error that it reached is the target.
Peers run a pilot, and the sample variance over its probes says how many reach the target: n = variance / target^2,
for a Frobenius norm by the delta method. Whole runs of Hutch++ are the probes of that method, as large as ours was.
Largest eigenvalues are asked for to the same tolerance, which is a residual's, except PyHessian's. Densities take as
many products as ours: peers do not tell the bias of theirs.

Products: what a Hessian-vector product costs in gradients, on one batch.

Contenders run in turn. Seconds are CPU seconds of the process (wall beside them for the suite), for a machine that
others use too; pass-equivalents are these divided by those of one forward pass over the examples. Printed are medians
over the repetitions.

    python benchmarks/sharpness.py [--large] [--full] [--width 4] [--examples 512] [--part products]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from importlib import metadata

import torch
from _figures import show
from _peers import PEERS, peers
from _products import products
from _published import BATCH
from _suite import suite
from _trained import CHUNK, Trained, trained
from rich.table import Table


def read_options() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(
        description="Cost of sharpness measures, beside the published procedure and peers."
    )
    parser.add_argument(
        "--large",
        action="store_true",
        help="width 4, 512 examples (50,000 on a GPU), a subset, effective_dimension: hours on a core, where the "
        "default is width 1 and 64 examples",
    )
    parser.add_argument("--full", action="store_true", help="run all of the published procedure")
    parser.add_argument("--part", choices=("suite", "peers", "products", "all"), default="all")
    parser.add_argument("--width", type=int, help="of the narrow ResNet-18 (default 1; large: 4)")
    parser.add_argument("--examples", type=int, help="training examples (default 64; large: 512, on a GPU 50,000)")
    parser.add_argument("--subset", type=int, help="examples of the subset (default 0: none; large: a quarter)")
    parser.add_argument("--only-subset", action="store_true", help="leave out our suite on all examples")
    parser.add_argument(
        "--peer-examples", type=int, help="examples in the comparison with peers (default 16; large: 512)"
    )
    parser.add_argument(
        "--memory", type=float, default=2.0, help="GiB that our graphs and Krylov bases may take, each, in the suite"
    )
    parser.add_argument("--epochs", type=int, default=15, help="of training")
    parser.add_argument("--fraction", type=float, default=0.03, help="of the published procedure's loops")
    parser.add_argument(
        "--published-examples", type=int, help="examples of its passes, whose seconds are scaled (default: all)"
    )
    parser.add_argument("--pilot", type=int, default=8, help="probes from which a peer's variance is taken")
    parser.add_argument("--products", type=int, help="the most that ours may take beside peers, twice for a density")
    parser.add_argument("--repetitions", type=int, help="of the suite and of the peers (default 1; large: 3)")
    parser.add_argument("--product-repetitions", type=int, help="of the products (default 2; large: 5)")
    parser.add_argument("--without", nargs="*", help="measures to leave out of both suites")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    options.device = torch.device(options.device)
    on_gpu = options.device.type == "cuda"
    options.width = options.width or (4 if options.large else 1)
    options.examples = options.examples or ((50_000 if on_gpu else 512) if options.large else 64)
    if options.subset is None:
        options.subset = max(64, options.examples // 4) if options.large else 0
    if options.only_subset and not options.subset:
        parser.error("--only-subset needs --subset")
    options.peer_examples = min(options.examples, options.peer_examples or (512 if options.large else 16))
    options.published_examples = min(options.examples, options.published_examples or options.examples)
    options.repetitions = options.repetitions or (3 if options.large else 1)
    options.product_repetitions = options.product_repetitions or (5 if options.large else 2)
    options.products = options.products or (128 if options.large else 32)
    if options.without is None:
        options.without = [] if options.large else ["effective_dimension"]
    return options


def main() -> None:
    """Train, compare, print."""
    options = read_options()
    torch.set_num_threads(options.threads)
    subject = trained(options)
    weights = sum(parameter.numel() for parameter in subject.model.parameters())
    with torch.no_grad():
        right = torch.cat([subject.model(x).argmax(dim=1) for x in torch.split(subject.x, BATCH)]) == subject.y
    about = (
        f"resnet18_narrow, {weights:,} weights, trained on {options.examples} examples: training loss "
        f"{subject.loss():.4f}, accuracy {float(right.float().mean()):.3f}; repetitions: {options.repetitions}, "
        f"of products {options.product_repetitions}"
    )
    packages = ("torch", "flatmin-sweep", *(name for name in PEERS.values() if installed(name)))
    device = torch.cuda.get_device_name() if options.device.type == "cuda" else ""
    for table, note in tables(subject, options):
        said = f"{about}. {note}" if note else about
        show(table, "sharpness", packages, device=device, threads=options.threads, about=said)


def tables(subject: Trained, options: argparse.Namespace) -> Iterator[tuple[Table, str]]:
    """Yield the tables of the parts asked for, each with what a reader has to know, as soon as they are found."""
    if options.part in ("products", "all"):
        yield products(subject.first(CHUNK), options), ""
    if options.part in ("peers", "all"):
        yield peers(subject.first(options.peer_examples), options), "PyHessian has no Frobenius norm"
    if options.part in ("suite", "all"):
        yield from suite(subject, options)


def installed(name: str) -> bool:
    """Return whether a distribution is there."""
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    main()
