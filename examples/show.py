"""Print some rows of a finished job."""

import argparse
import json
import textwrap
from itertools import islice
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("output", type=Path)
parser.add_argument("--rows", type=int, default=3)
arguments = parser.parse_args()
with arguments.output.open() as lines:
    for line in islice(lines, arguments.rows):
        row = json.loads(line)
        print(f"\n[{row['id']}] {row['usage']['completion_tokens']} tokens")
        print(textwrap.fill(row["text"].strip(), 100, replace_whitespace=False))
