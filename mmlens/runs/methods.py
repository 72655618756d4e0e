"""The methods paragraph and the bibliography of a run, for a paper."""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Iterable, Mapping
from typing import Any

from mmlens.arguments import unknown_name_message
from mmlens.errors import InvalidValueError
from mmlens.experiments.experiment import Experiment
from mmlens.experiments.judging import FIRST_TOKEN, JUDGES

SOFTWARE = ("mmlens", "transformers", "transformer_lens")
"""What every run cites."""


_ENTITIES = {
    "&": "&amp;",
    "<": "&lt;",
    ">": "&gt;",
    **{sign: f"&#{ord(sign)};" for sign in "*`\\$|~"},
}


def markdown_text(text: object) -> str:
    """A text that nobody wrote as Markdown (a model's name, a question, an error), on one line, showing as it stands.

    What Markdown would take for markup, HTML or a link is written as entities; other text stays readable.

    >>> print(markdown_text("<b> of a_b, [.8, .9] and [here](http://x)"))
    &lt;b&gt; of a_b, [.8, .9] and [here&#93;(http://x)
    """
    line = " ".join(str(text).split())
    line = "".join(_ENTITIES.get(sign, sign) for sign in line)
    # Brackets are links where these follow; underscores emphasise at the edge of a word only.
    line = re.sub(r"\](?=[(\[{:])", "&#93;", line)
    line = re.sub(r"\[(?=[@^])", "&#91;", line)
    line = re.sub(r"(?<![^\W_])_|_(?![^\W_])", "&#95;", line)
    # At the start of a line: headings, lists, quotations, rules.
    return re.sub(
        r"^(?:#+(?=\s|$)|[+-](?=\s|$)|[=-]+$|\d+(?=[.)](?:\s|$)))",
        lambda found: "".join(f"&#{ord(c)};" for c in found[0]),
        line,
    )


def filled_method(experiment: Experiment, settings: Mapping[str, Any]) -> str:
    """The experiment's method with its settings in place of their {names}.

    Raises ValueError where the method names what is no setting.
    """
    words = {
        name: value if isinstance(value, int | float | str) and not isinstance(value, bool) else _words(value)
        for name, value in settings.items()
    }
    # Limits of so many examples of each kind: None is no limit.
    words |= {name: "all" for name in words if name.startswith("n_per_kind") and settings[name] is None}
    try:
        return experiment.method.format(**words)
    except KeyError as error:
        raise InvalidValueError(
            unknown_name_message(f"setting in the method of {experiment.name}", error.args[0], settings)
        ) from error


def _of_source(source: Mapping[str, Any]) -> str:
    """Where examples are from: a folder, or a published data set."""
    if "hub" not in source:
        return (
            f"the folder {source['source']}, split by group within each kind (share for selection "
            f"{source['selection_share']:g}, seed {source['split_seed']})"
        )
    return (
        f"{source['title']} [@{source['cite']}] ({source['hub']}, revision {source['revision']}, licence "
        f"{source['licence']}), split by {source['group']} (share for selection {source['selection_share']:g}, seed "
        f"{source['split_seed']})"
    )


def methods_text(record: Mapping[str, Any]) -> str:
    """The methods paragraph of a run as Markdown, citations as [@key]; `record` is its run.json."""
    record = _escaped(record)
    model, data, machine, version = record["model"], record["data"], record["machine"], record["versions"]
    request, splits = record["request"], {name: data[name] for name in ("selection", "evaluation")}
    heads = (
        f"{sum(model['heads_per_layer'])} softmax-attention heads"
        if "heads_per_layer" in model
        else f"{model['n_heads']} heads each"
    )
    sizes = [
        f"{split['n']} for {name} ("
        + ", ".join(f"{n} {kind or 'of no kind'}" for kind, n in split["n_by_kind"].items())
        + ")"
        for name, split in splits.items()
    ]
    if "selection_seed" in data:
        drawn = (
            f"generated scenes, drawn with the seeds {data['selection_seed']} (selection) and "
            f"{data['evaluation_seed']} (evaluation)"
        )
    else:
        drawn = " and ".join(map(_of_source, data.get("parts", [data])))
    controls = sorted({kind for split in splits.values() for kind in split["controls"]})
    prints = " and ".join(f"{split['fingerprint']} ({name})" for name, split in splits.items())
    settings = "; ".join(f"{name} {_words(value)}" for name, value in request["settings"].items())
    # Records from before the choice have none: they are of first tokens.
    judged = JUDGES[request.get("answers", FIRST_TOKEN)].told
    cited = " ".join(f"[@{key}]" for key in record["experiment"]["cites"])
    paragraphs = [
        f"**Model.** {model['name']} ({model['family']}; {model['n_layers']} layers, {heads}; "
        f"{model['n_parameters']:,} parameters; fingerprint of the weights {model['fingerprint']}), run in "
        f"{machine['dtype']} on {machine.get('device_name', machine['device'])}.",
        f"**Data.** {drawn[0].upper()}{drawn[1:]}: {' and '.join(sizes)}."
        + (f" Text-only controls: {', '.join(controls)}." if controls else "")
        + f" Fingerprints: {prints}.",
        f"**Procedure.** {record['experiment']['method']} Source: {record['experiment']['source']}"
        f"{f' {cited}' if cited else ''}."
        + (f" {judged}." if judged else "")
        + (f" Settings: {settings}." if settings else ""),
        f"**Statistics.** The seed of every random choice was {request['seed']}; examples were run in batches of "
        f"{request['batch_size']}. Unless said otherwise, intervals are 95%: Wilson's for proportions, and "
        "bias-corrected and accelerated bootstrap intervals over examples for other means.",
        f"**Software.** mmlens {version['mmlens']} [@mmlens] (source fingerprint {record['code']}) on transformers "
        f"{version['transformers']} [@transformers], TransformerLens {version['transformer-lens']} "
        f"[@transformer_lens], PyTorch {version['torch']}, NumPy {version['numpy']}, SciPy {version['scipy']} and "
        f"Python {version['python']}; {machine['platform']}, {machine['threads']} thread"
        f"{'' if machine['threads'] == 1 else 's'}.",
    ]
    return "# Methods\n\n" + "\n\n".join(paragraphs) + "\n"


def bibliography(keys: Iterable[str]) -> str:
    """BibTeX of the entries with these keys, and of the software that every run uses.

    Raises ValueError for a key that is not in references.bib.

    >>> bibliography(["arxiv_2606_05843"]).count("@misc")
    3
    """
    entries = bibtex_entries()
    chosen = list(dict.fromkeys((*keys, *SOFTWARE)))
    for key in chosen:
        if key not in entries:
            raise InvalidValueError(unknown_name_message("entry of references.bib", key, entries))
    return "\n\n".join(entries[key] for key in chosen) + "\n"


def bibtex_entries() -> dict[str, str]:
    """The entries of references.bib by key, as they stand there. ValueError where one is broken or stands twice."""
    text = (
        importlib.resources.files("mmlens.experiments").joinpath("references.bib").read_text(encoding="utf-8")
    )
    import bibtexparser  # here, for it is not needed to start a command

    # No middleware: fields and names stay as they are written.
    library = bibtexparser.parse_string(text, parse_stack=[])
    if library.failed_blocks:
        first = library.failed_blocks[0].raw
        raise InvalidValueError(f"references.bib: an entry is broken or stands twice: {first!r:.60}")
    return {entry.key: str(entry.raw) for entry in library.entries}


def _escaped(value: Any) -> Any:
    """A record with every text in it, names of fields too, as `markdown_text` writes it."""
    if isinstance(value, Mapping):
        return {
            key if key.isidentifier() else markdown_text(key): _escaped(inner) for key, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [_escaped(inner) for inner in value]
    return markdown_text(value) if isinstance(value, str) else value


def _words(value: Any) -> str:
    """A setting as words: lists as their members, the rest as it is."""
    if isinstance(value, list | tuple):
        return ", ".join(map(_words, value)) or "none"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return str(value)
