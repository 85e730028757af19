"""`nemo-fp8 data`: make token files for `data=megatron_indexed` from text."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from nemo_fp8_recipes.corpus import tokenizer as tokenizers
from nemo_fp8_recipes.corpus.build import build, refuse_existing
from nemo_fp8_recipes.corpus.documents import Documents, find_files
from nemo_fp8_recipes.errors import ConfigError

__all__ = ["HELP", "run"]

HELP = """
usage: nemo-fp8 data --output PREFIX [options] TEXT [TEXT ...]

Make PREFIX.bin and PREFIX.idx, the token files that Megatron reads, from text files; PREFIX.json says what
they hold. Train on them with data=megatron_indexed data.blend=[PREFIX].

  TEXT                files, or directories of them: .jsonl holds a JSON object a line, of other files each is
                      one document; .gz is unpacked
  --output PREFIX     path of the files to make, without their endings
  --tokenizer NAME    a Hugging Face tokenizer.json (or its directory), or bytes; default: bytes
  --end TOKEN         the tokenizer's token after each document; default: <|endoftext|>, </s>, … as it has it
  --field NAME        of a .jsonl object: where the text is; default: text
  --documents UNIT    file | line: what a document is in files that are not .jsonl; default: file
  --pattern GLOB      files to take from directories, may be repeated; default: *.txt, *.jsonl and their .gz
  --overwrite         replace the files of that prefix

examples:
  nemo-fp8 data --output corpora/wiki --tokenizer nemotron/tokenizer.json wiki/*.jsonl
  nemo-fp8 data --output corpora/code --pattern '*.py' --tokenizer bytes src
"""

_PATTERNS = ["*.txt", "*.jsonl", "*.txt.gz", "*.jsonl.gz"]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"nemo-fp8 data: {message}.", hint="See nemo-fp8 data --help.")


def _parse(words: list[str]) -> argparse.Namespace:
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("sources", nargs="+", metavar="TEXT")
    parser.add_argument("--output", required=True)
    parser.add_argument("--tokenizer", default="bytes")
    parser.add_argument("--end")
    parser.add_argument("--field", default="text")
    parser.add_argument("--documents", choices=("file", "line"), default="file")
    parser.add_argument("--pattern", action="append")
    parser.add_argument("--overwrite", action="store_true")
    return parser.parse_args(words)


def run(words: list[str]) -> int:
    """Tokenize the text and say what was made."""
    given = _parse(words)
    prefix = Path(given.output)
    if not given.overwrite:
        refuse_existing(prefix)
    tokenizer = tokenizers.load(given.tokenizer, given.end)
    files = find_files(given.sources, given.pattern or _PATTERNS)
    documents = Documents(files, unit=given.documents, field=given.field)
    built = build(documents, tokenizer, prefix, progress=_show)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    left_out = f" ({built.empty} empty ones left out)" if built.empty else ""
    print(f"{prefix}.bin, .idx: {built.documents:,} documents{left_out}, {built.tokens:,} tokens")
    print(
        f"vocabulary {tokenizer.vocab_size:,}; documents end by {tokenizer.description['end']} "
        f"(id {tokenizer.end})"
    )
    print(f"Train on it: nemo-fp8 train data=megatron_indexed data.blend=[{prefix}]")
    return 0


def _show(documents: int, tokens: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{documents:,} documents, {tokens:,} tokens", end="", file=sys.stderr, flush=True)
