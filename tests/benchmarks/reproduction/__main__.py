"""Small-scale reproduction of the paper's tables and Figure 3 that runs on two CPU cores.

    python -m tests.benchmarks.reproduction --table 1|2|3|4|figure3 [--json F] [--seeds N] [--docs DIR]

1: text classification with three small models (Banking77 with GPT-4's recorded answers, headlines with a stand-in)
2: images: long-tailed digits, by head, medium and tail labels
3: captions of drawn scenes, BLEU-1 to BLEU-4
4: the ablation of Table 2: without 2CD and PP, with 2CD, with both
figure3: accuracy and deferral rate by threshold, on both text tasks

Each run writes its table between its marks in DIR/reproduction.md, and its plots to DIR/reproduction/. Without --docs,
it only prints. `--clip FOLDER` adds rows with a transformers image-text model as the large model to tables 2 and 4.
`--cifar FOLDER` uses CIFAR-100 (Parquet files from Hugging Face, uoft-cs/cifar100) instead of digits. `--amazon FILE`
uses Amazon reviews (JSONL with reviewText and overall, or CSV with text and label) instead of headlines in table 1.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from tests.benchmarks.reproduction import captions, images, text
from tests.benchmarks.reproduction.output import write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", required=True, choices=["1", "2", "3", "4", "figure3"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--docs", type=Path)
    parser.add_argument("--clip", help="folder of a transformers CLIP model (tables 2 and 4)")
    parser.add_argument("--cifar", type=Path, help="folder with the Parquet files of CIFAR-100 (tables 2 and 4)")
    parser.add_argument("--amazon", type=Path, help="file of Amazon reviews (table 1)")
    parser.add_argument("--reuse", type=Path, help="JSON output of table 1, whose results figure3 reuses")
    parser.add_argument("--small-run", action="store_true", help="a smoke test of some seconds")
    options = parser.parse_args()
    started = time.perf_counter()
    runs: dict[str, Any] = {
        "1": text.table_1, "2": images.table_2, "3": captions.table_3, "4": images.table_4, "figure3": text.figure_3,
    }  # fmt: skip
    found = runs[options.table](options)
    found.figures["seconds"] = round(time.perf_counter() - started, 1)
    print(found.markdown)
    print(json.dumps(found.figures, indent=2))
    if options.json:
        options.json.write_text(json.dumps(found.figures, indent=2) + "\n")
    if options.docs:
        write(found, options.docs, options.table)


if __name__ == "__main__":
    main()
