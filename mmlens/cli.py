"""The `mmlens` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from mmlens.core_heads import MODES, core_heads
from mmlens.core_heads_report import write_core_heads_report
from mmlens.data.examples import DataError, Example, load_examples, split_examples
from mmlens.data.scenes import KINDS, TEXT_KINDS, scene_examples
from mmlens.families.catalog import UnknownFamilyError
from mmlens.families.support import support_table
from mmlens.hook_names import unknown_name_message
from mmlens.hooked_vlm import HookedVLM
from mmlens.interventions.ablation import MODES as ABLATION_MODES
from mmlens.loading import ModelNotFoundError, shipped_models
from mmlens.prompt import PromptError
from mmlens.token_map import TokenMapError

_USER_ERRORS = (
    DataError,
    ModelNotFoundError,
    PromptError,
    TokenMapError,
    UnknownFamilyError,
    ValueError,
    IndexError,
)

# Scenes are drawn from their seed: these differ from each other and from the training's, 2**20 and up.
SELECTION_SEED, EVALUATION_SEED = 100_000, 200_000


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 on success, 2 where the input is at fault (with a one-line reason)."""
    options = _parser().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        options.run(options)
    except _USER_ERRORS as error:
        print(f"mmlens: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mmlens", description="Find and test attention heads of vision-language models."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    core = commands.add_parser(
        "core-heads",
        help="find CoRe heads on one split and test them causally on another",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    core.set_defaults(run=_core_heads)
    core.add_argument("--model", default="micro", help="a shipped model, a folder, or a hub id")
    core.add_argument(
        "--out", type=Path, required=True, help="folder for summary.json, tables and report.html"
    )
    core.add_argument(
        "--data", type=Path, help="a folder of examples (docs/data.md); shipped models have their own"
    )
    core.add_argument(
        "--n-selection", type=int, default=40, help="generated examples of each kind to choose heads on"
    )
    core.add_argument(
        "--n-evaluation", type=int, default=30, help="generated examples of each kind to judge heads on"
    )
    core.add_argument(
        "--selection-share", type=float, default=0.5, help="with --data: share of it to choose heads on"
    )
    core.add_argument(
        "--counts", type=int, nargs="+", help="numbers of heads to ablate; 5%% of all is always added"
    )
    core.add_argument(
        "--modes", nargs="+", default=list(MODES), choices=ABLATION_MODES, help="ablation modes"
    )
    core.add_argument("--draws", type=int, default=10, help="draws of each random arm")
    core.add_argument("--seed", type=int, default=0)
    core.add_argument("--batch-size", type=int, default=30)
    core.add_argument("--mapping", default="merged", choices=("merged", "paper_floor"), help="box to token")
    core.add_argument("--dtype", help="as transformers takes it, e.g. bfloat16")
    core.add_argument("--device-map", help="as transformers takes it, e.g. auto")
    core.add_argument("--attn-implementation", help="as transformers takes it, e.g. sdpa")
    core.add_argument("--trust-remote-code", action="store_true", help="run model code from the hub")
    core.add_argument("--threads", type=int, default=0, help="torch threads (0: torch's own choice)")
    families = commands.add_parser(
        "families", help="which of transformers' image-text-to-text families are supported, and how far"
    )
    families.set_defaults(run=_families, threads=0)
    families.add_argument("family", nargs="?", help="one family (a model_type), with all its notes")
    families.add_argument("--csv", type=Path, help="write the whole table to this file")
    return parser


def _families(options: argparse.Namespace) -> None:
    table = support_table()
    if options.csv is not None:
        table.to_csv(options.csv, index=False)
        print(options.csv)
        return
    if options.family is not None:
        found = table[table["family"] == options.family]
        if not len(found):
            raise UnknownFamilyError(unknown_name_message("family", options.family, table["family"]))
        for name, value in found.iloc[0].items():
            print(f"{name}: {value or '-'}")
        return
    for row in table.itertuples():
        print(f"{row.family:26} {row.status:10} token map: {row.token_map:4.3} {row.notes[:120]}".rstrip())
    counts = table["status"].value_counts()
    print(
        f"\n{len(table)} families: {', '.join(f'{n} {status}' for status, n in counts.items())}. "
        "All notes of one: mmlens families FAMILY; the whole table: --csv FILE"
    )


def _core_heads(options: argparse.Namespace) -> None:
    given = {
        "dtype": options.dtype,
        "device_map": options.device_map,
        "attn_implementation": options.attn_implementation,
    }
    selection, evaluation = _splits(options)
    model = HookedVLM.from_pretrained(
        options.model,
        trust_remote_code=options.trust_remote_code,
        **{name: value for name, value in given.items() if value is not None},
    )
    result = core_heads(
        model,
        selection,
        evaluation,
        counts=options.counts,
        modes=options.modes,
        n_draws=options.draws,
        seed=options.seed,
        batch_size=options.batch_size,
        mapping=options.mapping,
    )
    result.summary["model"]["name"] = options.model
    result.save(options.out)
    report = write_core_heads_report(result, model, options.out / "report.html")
    print(f"\n{result.summary['finding']['statement']}")
    print(f"CoRe heads (top 5% by RAM): {', '.join(f'L{layer}H{head}' for layer, head in result.top)}")
    print(f"report: {report}")


def _splits(options: argparse.Namespace) -> tuple[list[Example], list[Example]]:
    if options.data is not None:
        return split_examples(load_examples(options.data), options.selection_share, options.seed)
    if options.model not in shipped_models():
        raise DataError(
            f"--model {options.model} needs --data FOLDER, a folder of examples (docs/data.md); generated scenes "
            f"are for the shipped models: {', '.join(shipped_models())}"
        )
    kinds = (*KINDS, *TEXT_KINDS)
    return tuple(  # type: ignore[return-value]
        [example for kind in kinds for example in scene_examples(kind, n, seed + options.seed)]
        for n, seed in ((options.n_selection, SELECTION_SEED), (options.n_evaluation, EVALUATION_SEED))
    )
