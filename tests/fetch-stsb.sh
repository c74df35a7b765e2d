#!/usr/bin/env bash
# Makes evaluation pairs, calibration text and text to retrain on of the STS benchmark (English) from files that the user
# has downloaded.
#
# No package registry is known to carry the benchmark, so that no package manager can bring it. The pairs are
# those of the dev split and the texts those of the train split: settings may be chosen on both. The test split is never
# read, so that it can still say something. The folder gets all files or none.
set -euo pipefail

usage() {
    cat <<USAGE
usage: bash tests/fetch-stsb.sh DIR SOURCE

Writes DIR/stsb-dev.csv (sentence, sentence, score from 0 to 5; 1500 pairs), DIR/texts.txt (the first 2048 different
sentences of the train split, one a line: captions) and DIR/sentences.txt (all of the train split that are not in the dev
split, mixed) from the folder SOURCE, which holds the STS benchmark's dev and train split as one of its usual downloads
has them:

  sts-dev.csv, sts-train.csv              the original archive, Stsbenchmark.tar.gz (columns parted by tabs)
  dev.tsv, train.tsv                      GLUE's archive, STS-B.zip
  validation.jsonl, train.jsonl (or .gz)  the data set mteb/stsbenchmark-sts of the Hugging Face hub

for example after
  hf download mteb/stsbenchmark-sts --repo-type dataset --local-dir SOURCE

Scores CC BY-SA 4.0, texts under several licences (see the benchmark's own page). Needs python3. Without it,
tests/sample has a small set of this project's own.
USAGE
}

die() {
    printf 'tests/fetch-stsb.sh: %s\n' "$*" >&2
    exit 1
}

case ${1:-} in
    -h | --help)
        usage
        exit 0
        ;;
    -*)
        usage >&2
        exit 2
        ;;
esac
(($# == 2)) || { usage >&2 && exit 2; }
dir=${1%/}
source=${2%/}

command -v python3 >/dev/null || die "python3 is missing: it converts the files"
[[ -d $source ]] || die "$source is no folder: download the benchmark first (see --help)"
for name in stsb-dev.csv texts.txt sentences.txt; do
    [[ ! -e $dir/$name ]] || die "$dir/$name is there already: remove it, or name another folder"
done

mkdir -p "$dir"
work=$(mktemp -d "$dir/.fetch-stsb.XXXXXX")
trap 'rm -rf "$work"' EXIT

python3 - "$source" "$work" <<'PYTHON' || die "nothing was written"
import csv, gzip, hashlib, json, pathlib, random, sys

source, work = map(pathlib.Path, sys.argv[1:])
csv.field_size_limit(1 << 24)
ROWS = {"dev": 1500, "train": 5749}
# Of the sentences and scores of the dev split as tests/minilm.rs and the README's figures were measured on them.
SUM = "9ef4efcb3f3763273cb30445f5263db22946367ac2f9291f3a1d716f47bf4901"


def fail(reason):
    sys.exit(f"tests/fetch-stsb.sh: {reason}")


def opened(path):
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    return path.open(encoding="utf-8", newline="")


def tabs(path, header):
    """Rows of columns parted by tabs, in which quotes mean nothing."""
    rows = [line.rstrip("\r\n").split("\t") for line in opened(path)]
    if not header:
        return [(row[5], row[6], row[4]) for row in rows if len(row) >= 7]
    at = [rows[0].index(name) for name in ("sentence1", "sentence2", "score")]
    return [tuple(row[i] for i in at) for row in rows[1:] if len(row) > max(at)]


def lines(path):
    rows = [json.loads(line) for line in opened(path) if line.strip()]
    return [(row["sentence1"], row["sentence2"], row["score"]) for row in rows]


def split(name):
    hub = "validation" if name == "dev" else name
    kinds = [
        (f"sts-{name}.csv", lambda path: tabs(path, False)),
        (f"{name}.tsv", lambda path: tabs(path, True)),
        (f"{hub}.jsonl", lines),
        (f"{hub}.jsonl.gz", lines),
    ]
    for file, read in kinds:
        found = sorted(source.rglob(file))
        if found:
            break
    else:
        known = ", ".join(file for file, _ in kinds)
        parquet = any(source.rglob("*.parquet"))
        why = " (Parquet files are not read: download one of the others)" if parquet else ""
        fail(f"{source} has none of {known}{why}")
    try:
        rows = [(a.strip(), b.strip(), float(score)) for a, b, score in read(found[0])]
    except (ValueError, KeyError, IndexError, UnicodeDecodeError, OSError) as e:
        fail(f"{found[0]}: {type(e).__name__}: {e}")
    if len(rows) != ROWS[name]:
        fail(f"{found[0]} has {len(rows)} pairs; the {name} split has {ROWS[name]}")
    scores = [score for *_, score in rows]
    # Some copies are scaled to 1.
    if max(scores) <= 1:
        rows = [(a, b, round(5 * score, 3)) for a, b, score in rows]
    if not all(0 <= score <= 5 for *_, score in rows) or not all(a and b for a, b, _ in rows):
        fail(f"{found[0]}: a sentence is empty, or a score is not from 0 to 5")
    return rows


dev, train = split("dev"), split("train")
digest = hashlib.sha256("".join(f"{a}\t{b}\t{score:.3f}\n" for a, b, score in dev).encode()).hexdigest()
if digest != SUM:
    print("note: the number of pairs is right, but some sentence or score is not as in the copy that this project's", file=sys.stderr)
    print(f"figures were measured on (sha256 {digest[:16]}..., not {SUM[:16]}...): expect small differences", file=sys.stderr)
with (work / "stsb-dev.csv").open("w", encoding="utf-8", newline="") as file:
    csv.writer(file, lineterminator="\n").writerows(dev)
sentences = list(dict.fromkeys(sentence for a, b, _ in train for sentence in (a, b)))
(work / "texts.txt").write_text("".join(sentence + "\n" for sentence in sentences[:2048]), encoding="utf-8")
of_dev = {sentence for a, b, _ in dev for sentence in (a, b)}
mixed = [sentence for sentence in sentences if sentence not in of_dev]
random.Random(24).shuffle(mixed)
(work / "sentences.txt").write_text("".join(sentence + "\n" for sentence in mixed), encoding="utf-8")
PYTHON

mv "$work/stsb-dev.csv" "$work/texts.txt" "$work/sentences.txt" "$dir/"
count() { wc -l <"$dir/$1" | tr -d ' '; }
echo "$dir: stsb-dev.csv (1500 pairs), texts.txt ($(count texts.txt) sentences) and sentences.txt ($(count sentences.txt))" \
    "written"
